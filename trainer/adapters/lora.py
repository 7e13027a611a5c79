"""LoRA and what is one line away from it, by peft.

LoRA (Hu et al. 2021, arXiv:2106.09685): W x + (alpha / r) B A x, with A of shape [r, in] and B of shape [out, r].
rsLoRA (Kalajdzievski 2023, arXiv:2312.03732): the same with alpha / sqrt(r), so that gradients keep their size as the
rank grows.
DoRA (Liu et al. 2024, arXiv:2402.09353): the sum W + (alpha / r) B A is normalised per output row and scaled by a
trained magnitude m of shape [out].
LoRA+ (Hayou et al. 2024, arXiv:2402.12354): B learns at ``lr_ratio`` times the rate of A; in wide layers a common rate
is too low for B or too high for A.
B starts at zero, so that the first forward is the base's own.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

import torch

from trainer.adapters.peft_method import PeftMethod


class Lora(PeftMethod):
    peft_type = "LORA"
    use_dora = False
    use_rslora = False

    def settings(self, base: torch.nn.Module) -> dict[str, Any]:
        section = self.recipe.adapter
        return {
            "r": section.rank,
            "lora_alpha": section.alpha,
            "lora_dropout": section.dropout,
            "bias": section.bias,
            "use_dora": self.use_dora,
            "use_rslora": self.use_rslora,
        }

    def initialise(self, model: Any, plain: Callable[[], torch.nn.Module] | None) -> None:
        initialise(model, self.recipe.seed)

    def starts_at_zero(self, saved_name: str) -> bool:
        return ".lora_B." in saved_name


class RsLora(Lora):
    use_rslora = True


class Dora(Lora):
    use_dora = True


class LoraPlus(Lora):
    def lr_scale(self, name: str) -> float:
        assert self.recipe.adapter.lr_ratio is not None
        return self.recipe.adapter.lr_ratio if ".lora_B." in name else 1.0


def initialise(model: torch.nn.Module, seed: int) -> None:
    """Draws every lora_A from a generator seeded by (seed, parameter name): independent of ranks and of load order."""
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            value = torch.empty(parameter.shape, dtype=torch.float32)
            torch.nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator)
            parameter.data.copy_(value)
