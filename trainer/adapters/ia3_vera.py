"""Methods that train vectors.

(IA)³ (Liu et al. 2022, arXiv:2205.05638): keys, values and the inner activations of the feed-forward layers are scaled
by trained vectors that start at one. The vector scales the output of a target module, or its input if the target is the
second layer of a feed-forward block.
VeRA (Kopiczko et al. 2023, arXiv:2310.11454): W x + diag(b) B diag(d) A x. A and B are random, frozen and shared by
all layers; d starts at 0.1, b at zero. A and B are drawn from the recipe's seed and saved with the adapter.
"""

from __future__ import annotations

from typing import Any

import torch

from trainer.adapters.peft_method import PeftMethod
from trainer.adapters.targets import matched_linear


class IA3(PeftMethod):
    peft_type = "IA3"

    def targets(self, base: torch.nn.Module) -> str | list[str]:
        return matched_linear(base, super().targets(base))

    def settings(self, base: torch.nn.Module) -> dict[str, Any]:
        if self.recipe.adapter.target_modules is None:
            return {}  # peft then uses its own targets and feed-forward layers for the architecture
        return {"feedforward_modules": [n for n in self.targets(base) if _leads_back(base, n)]}


class Vera(PeftMethod):
    peft_type = "VERA"

    def settings(self, base: torch.nn.Module) -> dict[str, Any]:
        section = self.recipe.adapter
        return {
            "r": section.rank,
            "vera_dropout": section.dropout,
            "bias": section.bias,
            "projection_prng_key": self.recipe.seed,
            "save_projection": True,
        }

    def starts_at_zero(self, saved_name: str) -> bool:
        return saved_name.endswith(".vera_lambda_b")


def _leads_back(base: Any, name: str) -> bool:
    """Returns True if a linear layer maps a feed-forward block's inner dimension back to the hidden one."""
    layer: Any = base.get_submodule(name)
    is_conv1d = type(layer).__name__ == "Conv1D"
    inner, outer = layer.weight.shape if is_conv1d else (layer.in_features, layer.out_features)
    hidden = base.config.get_text_config().hidden_size
    return "att" not in name and bool(outer == hidden != inner)
