"""AdaLoRA (Zhang et al. 2023, arXiv:2303.10512): a budget of ranks, distributed over the layers during training.

The update is P diag(E) Q with P, Q kept near orthogonal by a penalty. After each step every triplet (a column of P, an
entry of E, a row of Q) is scored by smoothed sensitivity |w dL/dw| times its uncertainty; the budget falls from
``rank`` to ``target_rank`` per layer along a cubic, and the entries of E with the lowest scores are set to zero.

The saved file keeps all ``rank`` rows, with E = 0 for the rows outside the budget, so that training can resume from any
checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from trainer.adapters.lora import Lora
from trainer.adapters.peft_method import ADAPTER_NAME

LATER = 10**9
"""Placeholder for the run's number of steps until the first update sets it."""
SCORES = ("exp_avg_ipt", "exp_avg_unc")
PATTERN = "rank_pattern"


class AdaLora(Lora):
    peft_type = "ADALORA"
    reads_base = True  # not supported with a sharded load

    def settings(self, base: torch.nn.Module) -> dict[str, Any]:
        section = self.recipe.adapter
        return {
            "init_r": section.rank,
            "target_r": section.target_rank,
            "lora_alpha": section.alpha,
            "lora_dropout": section.dropout,
            "bias": section.bias,
            "deltaT": section.prune_every,
            "orth_reg_weight": section.orthogonality,
            "total_step": LATER,
        }

    def initialise(self, model: Any, plain: Any) -> None:
        """Keeps peft's initial values: P and Q from a normal distribution, E zero."""

    def saved_config(self, model: Any) -> Any:
        config = super().saved_config(model)
        config.rank_pattern = None
        return config

    @contextmanager
    def around_update(self, model: Any, step: int, total_steps: int) -> Iterator[None]:
        self._schedule(model.peft_config[ADAPTER_NAME], total_steps)
        self._pull_towards_orthogonal(model)
        yield
        # After the update: the scores multiply the gradients with the updated weights.
        model.base_model.update_and_allocate(step)

    def _schedule(self, config: Any, total_steps: int) -> None:
        """Sets the steps at which the budget starts and stops to fall."""
        section = self.recipe.adapter
        assert section.prune_start is not None
        assert section.prune_end is not None
        config.total_step = total_steps
        # At least one step between the two phases: the first scores need it.
        config.tinit = max(0, min(int(section.prune_start * total_steps), total_steps - 2))
        config.tfinal = total_steps - max(int(section.prune_end * total_steps), config.tinit + 2)

    @torch.no_grad()
    def _pull_towards_orthogonal(self, model: Any) -> None:
        """Adds the gradient of weight * mean over all P, Q of ||P^T P - I||_F (||Q Q^T - I||_F)."""
        found = [
            (n, p) for n, p in model.named_parameters() if (".lora_A." in n or ".lora_B." in n) and p.requires_grad
        ]
        for name, parameter in found:
            rows = parameter.T if ".lora_B." in name else parameter
            off = rows @ rows.T - torch.eye(len(rows), device=rows.device)
            pull = (self.recipe.adapter.orthogonality or 0.0) * 2 * (off / off.norm()) @ rows / len(found)
            assert parameter.grad is not None
            parameter.grad += pull.T if ".lora_B." in name else pull

    def state(self, model: Any) -> dict[str, torch.Tensor]:
        allocator = model.base_model.rankallocator
        kept = {f"{kind}.{n}": t for kind in SCORES for n, t in getattr(allocator, kind).items()}
        pattern = model.peft_config[ADAPTER_NAME].rank_pattern or {}
        return kept | {f"{PATTERN}.{n}": torch.tensor(kept_ranks) for n, kept_ranks in pattern.items()}

    def load_state(self, model: Any, state: Mapping[str, torch.Tensor]) -> None:
        allocator, parameters = model.base_model.rankallocator, dict(model.base_model.model.named_parameters())
        allocator.reset_ipt()
        pattern: dict[str, list[bool]] = {}
        for key, tensor in state.items():
            kind, name = key.split(".", 1)
            if kind == PATTERN:
                pattern[name] = tensor.tolist()
                continue
            getattr(allocator, kind)[name] = tensor.to(parameters[name].device)
            allocator.ipt[name] = torch.zeros_like(parameters[name])
        model.peft_config[ADAPTER_NAME].rank_pattern = pattern or None

    def starts_at_zero(self, saved_name: str) -> bool:
        return saved_name.endswith(".lora_E")
