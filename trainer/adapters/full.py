"""``method: none``: full fine-tuning. The saved file is a plain model in the recipe's dtype.

The optimizer updates float32 master weights, which belong to the strategy. When the recipe's dtype is narrower, the
checkpoint saves them in addition to the model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from trainer.adapters.base import Adapter


class Full(Adapter):
    weights_file = "model.safetensors"

    @property
    def full(self) -> bool:
        return True

    def attach(self, base: torch.nn.Module, plain: Callable[[], torch.nn.Module] | None = None) -> torch.nn.Module:
        return base

    def loads_by_shard(self, base: torch.nn.Module) -> bool:
        return True

    def attach_without_weights(self, base: torch.nn.Module) -> torch.nn.Module:
        return base

    def saved_names(self, model: torch.nn.Module) -> dict[str, str]:
        return {n: n for n, p in model.named_parameters() if p.requires_grad}

    def save(self, model: Any, weights: Mapping[str, torch.Tensor], folder: Path) -> None:
        from safetensors.torch import save_file

        dtype = getattr(torch, self.recipe.model.dtype)
        tensors = {name: tensor.to(dtype).contiguous() for name, tensor in weights.items()}
        save_file(tensors, folder / self.weights_file, {"format": "pt"})
        config = {**model.config.to_dict(), "dtype": self.recipe.model.dtype, "architectures": [type(model).__name__]}
        (folder / "config.json").write_text(json.dumps(config, indent=2, default=str, sort_keys=True) + "\n")
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(str(folder))
