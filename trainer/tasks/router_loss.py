"""The loss that keeps the experts of a mixture evenly used, computed by the model's own formula.

Switch transformers (Fedus et al. 2021, arXiv:2101.03961): with E experts, the share f_e of a text's tokens that are
routed to expert e, and the mean p_e of the routers' probabilities of e, loss = E Σ_e f_e p_e. Only p_e has a gradient.
transformers takes both means over all routers of the model.

The loss is not a sum over tokens, so that its value depends on the tokens that are counted together. Here these are the
tokens of a pack, without padding. The losses of the packs of a step are averaged with their target tokens as weights,
so that neither the number of ranks nor the size of a micro-batch changes the result.

Legend: B packs, L tokens, n tokens of a pack, E experts, k experts per token, R routers.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trainer.errors import InputError
from trainer.experts import expert_counts, experts_per_token
from trainer.tasks.base import LossOutput
from trainer.tasks.inputs import to_device

if TYPE_CHECKING:
    from trainer.data import Batch

FORMULA = "load_balancing_loss_func"
ARGUMENTS = ["gate_logits", "num_experts", "top_k", "attention_mask"]
"""The name and the arguments of the formula in the module of each model of transformers that has one."""


class RouterLoss:
    """``coefficient``: factor of the loss; ``auto`` takes the one of the model's configuration."""

    def __init__(self, model: Any, coefficient: float | str) -> None:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        config = base.config.get_text_config()
        self._model = type(base).__name__
        formula: Any = getattr(sys.modules[type(base).__module__], FORMULA, None)
        if formula is None or list(inspect.signature(formula).parameters) != ARGUMENTS or not expert_counts(config):
            raise self._without_routers()
        self._formula: Callable[..., torch.Tensor] = formula
        self._per_token = experts_per_token(config)
        own = getattr(config, "router_aux_loss_coef", None)
        if coefficient == "auto" and not own:
            raise InputError(
                f"training.router_aux_loss_coef auto takes the model's own coefficient, and {self._model} names "
                f"{own}; give a number"
            )
        self._coefficient = float(own if coefficient == "auto" else coefficient)  # type: ignore[arg-type]

    def added(
        self, loss_sum: Callable[[Any], torch.Tensor], module: Any, batch: Batch, device: torch.device
    ) -> LossOutput:
        """Returns the sum of ``loss_sum``, which calls the model that it is given, and of this loss."""
        recorded: list[tuple[torch.Tensor, ...]] = []

        def recording(**inputs: Any) -> Any:
            output = module(**inputs, output_router_logits=True)
            recorded.append(output.router_logits)
            return output

        total = loss_sum(recording)
        (logits,) = recorded
        if not logits:
            raise self._without_routers()
        routers = [router.reshape(-1, router.shape[-1]).float() for router in logits]
        loss, sums = self._of(routers, batch, device)
        return LossOutput(total + self._coefficient * loss, sums)

    def _of(
        self, routers: list[torch.Tensor], batch: Batch, device: torch.device
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        real = _real(batch)
        # Zero, but connected to every router: under ZeRO-3 all ranks must pass the same modules in the backward.
        loss = 0.0 * torch.stack([logits.sum() for logits in routers]).sum()
        for row, targets in enumerate(batch.targets.sum(-1).tolist()):
            if targets:
                at = to_device(np.flatnonzero(real[row]) + row * real.shape[1], device)
                pack = tuple(logits[at] for logits in routers)
                loss = loss + targets * self._formula(pack, pack[0].shape[-1], self._per_token, None)
        at = to_device(np.flatnonzero(real), device)
        tokens = torch.stack([self._tokens(logits.detach()[at]) for logits in routers])
        weight = torch.tensor(float(batch.targets.sum()), device=device)
        return loss, {"router_aux_loss": loss.detach(), "router_weight": weight, "expert_tokens": tokens}

    def _tokens(self, logits_TE: torch.Tensor) -> torch.Tensor:
        """Counts the tokens of each expert [E], as the formula does."""
        chosen = logits_TE.topk(self._per_token, -1).indices.reshape(-1)
        return torch.zeros(logits_TE.shape[-1], device=chosen.device).scatter_add_(
            0, chosen, torch.ones_like(chosen, dtype=torch.float32)
        )

    def _without_routers(self) -> InputError:
        return InputError(
            "training.router_aux_loss_coef needs a mixture of experts for which transformers has a router loss, and "
            f"{self._model} is none; leave it out"
        )


def _real(batch: Batch) -> np.ndarray:
    """Returns the mask [B, L] of the tokens that are no padding. A pad is at position 0, and no token follows it in its
    sample."""
    follows = np.zeros_like(batch.targets)
    follows[:, :-1] = batch.position_ids[:, 1:] == 1
    real: np.ndarray = follows | (batch.position_ids > 0)
    return real


def router_metrics(sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Returns a step's metrics: the loss without its coefficient; the tokens of the busiest expert of any router, over
    those of an even distribution; and the share of experts, of all routers, that got no token."""
    tokens_RE = sums["expert_tokens"]
    even_R1 = tokens_RE.mean(-1, keepdim=True).clamp(min=1e-9)
    return {
        "router_aux_loss": float(sums["router_aux_loss"]) / max(1.0, float(sums["router_weight"])),
        "expert_load_max": float((tokens_RE / even_R1).max()),
        "experts_unused": float((tokens_RE == 0).double().mean()),
    }
