"""LoRA and its close variants, as peft implements them.

LoRA (Hu et al. 2021, arXiv:2106.09685): W x + (alpha / r) B A x, with A of shape [r, in] and B of shape [out, r].
rsLoRA (Kalajdzievski 2023, arXiv:2312.03732): LoRA with the scale alpha / sqrt(r), so that gradients keep their size as
the rank grows.
DoRA (Liu et al. 2024, arXiv:2402.09353): the sum W + (alpha / r) B A is normalised per output row and scaled by a
trained magnitude m of shape [out].
LoRA+ (Hayou et al. 2024, arXiv:2402.12354): B learns at ``lr_ratio`` times the rate of A; in wide layers a common rate
is too low for B or too high for A.
B starts at zero, so that the first forward equals that of the base model.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from trainer.adapters.meta_init import META
from trainer.adapters.peft_method import ADAPTER_NAME, PeftMethod
from trainer.experts import compute_by_expert

if TYPE_CHECKING:
    from trainer.adapters.base import Rows


log = logging.getLogger(__name__)


class Lora(PeftMethod):
    peft_type = "LORA"
    adapts_experts = True
    use_dora = False
    use_rslora = False

    def settings(self, base: torch.nn.Module) -> dict[str, Any]:
        section = self.recipe.adapter
        return {
            "r": section.rank,
            "lora_alpha": section.alpha,
            # peft refuses dropout on experts, also where it only loads the adapter; see `complete`.
            "lora_dropout": 0.0 if self.expert_targets(base) else section.dropout,
            "bias": section.bias,
            "use_dora": self.use_dora,
            "use_rslora": self.use_rslora,
        }

    def complete(self, model: Any) -> None:
        from peft.tuners.lora import LoraLayer
        from peft.tuners.lora.layer import ParamWrapper

        by_sum = compute_by_expert(model)
        dropout = self.recipe.adapter.dropout
        if not dropout or not any(isinstance(module, ParamWrapper) for module in model.modules()):
            return
        for name, layer in model.named_modules():
            if isinstance(layer, LoraLayer) and name not in by_sum:
                layer.lora_dropout.update({ADAPTER_NAME: torch.nn.Dropout(dropout).train(model.training)})
        if by_sum:
            log.warning(
                "adapter.dropout %g is not applied to the experts of %s, whose code has no place for it",
                dropout,
                type(model.get_base_model()).__name__,
            )

    def initialise(self, model: Any, plain: Callable[[], torch.nn.Module] | None) -> None:
        initialise(model, self.recipe.seed)

    def attach_without_weights(self, base: torch.nn.Module) -> torch.nn.Module:
        # The adapter is on the meta device too: for a large model, even its float32 initial values need much memory.
        with META:
            return self.attach(base)

    def init_parameter(self, name: str, shape: torch.Size, start: int, stop: int, rows: Rows) -> torch.Tensor:
        if ".lora_A." in name:
            return drawn(name, shape, self.recipe.seed).view(-1)[start:stop]
        if ".lora_B." in name:
            return torch.zeros(stop - start)
        return super().init_parameter(name, shape, start, stop, rows)

    def starts_at_zero(self, saved_name: str) -> bool:
        return ".lora_B." in saved_name


class RsLora(Lora):
    use_rslora = True


class Dora(Lora):
    use_dora = True
    adapts_experts = False

    def loads_by_shard(self, base: torch.nn.Module) -> bool:
        transposed = any(type(module).__name__ == "Conv1D" for module in base.modules())  # its rows are columns
        return super().loads_by_shard(base) and not transposed

    def init_parameter(self, name: str, shape: torch.Size, start: int, stop: int, rows: Rows) -> torch.Tensor:
        module, marker, _ = name.partition(".lora_magnitude_vector.")
        if not marker:
            return super().init_parameter(name, shape, start, stop, rows)
        # The magnitude starts as the norm of the base's rows, in the base's dtype.
        parts = rows(f"{module}.base_layer.weight", start, stop)
        norms = [row_norms(part) for part in parts]
        return torch.cat(norms) if norms else torch.empty(0)


class LoraPlus(Lora):
    def lr_scale(self, name: str) -> float:
        assert self.recipe.adapter.lr_ratio is not None
        return self.recipe.adapter.lr_ratio if ".lora_B." in name else 1.0


def initialise(model: torch.nn.Module, seed: int) -> None:
    """Draws every lora_A from a generator seeded by (seed, parameter name), independent of ranks and load order."""
    for name, parameter in model.named_parameters():
        if ".lora_A." in name and not parameter.is_meta:
            parameter.data.copy_(drawn(name, parameter.shape, seed))


def drawn(name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    value = torch.empty(shape, dtype=torch.float32)
    torch.nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator)
    return value


def row_norms(weight: torch.Tensor) -> torch.Tensor:
    """Returns the L2 norm of each row of [rows, columns]. The bits of a norm do not depend on the number of rows."""
    # torch splits a reduction to a single number over threads, which changes the order of the additions.
    several = weight if len(weight) != 1 else weight.expand(2, -1)
    norms: torch.Tensor = torch.linalg.norm(several, dim=1)
    return norms[: len(weight)]
