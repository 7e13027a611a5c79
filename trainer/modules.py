"""Facts about the modules of a model of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from trainer.errors import InputError


def text_model(model: Any) -> torch.nn.Module:
    """Returns the part of a model for several media (text and images) that reads text; any other model as it is."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config") and config.get_text_config() is not config:
        text: torch.nn.Module = model.get_decoder()
        return text
    whole: torch.nn.Module = model
    return whole


def head_module(model: Any) -> torch.nn.Module:
    """Returns the output layer of a decoder, which turns the hidden state of each token into logits or scores: the base
    model's, without an adapter's outer class. Raises InputError for a model without one, such as an encoder."""
    head: torch.nn.Module | None = model.get_output_embeddings() or getattr(model, "score", None)
    if head is None:
        raise InputError(f"{type(model).__name__} has no output layer for each token")
    return head


def computes_plain_product(kind: type[torch.nn.Module]) -> bool:
    """Returns True for ``nn.Linear``, and for a subclass with the same constructor and product, such as Falcon's.
    Routers and grouped products are subclasses too, and compute something else."""
    if kind is torch.nn.Linear:
        return True
    if not issubclass(kind, torch.nn.Linear) or kind is NonDynamicallyQuantizableLinear:  # attention reads its weight
        return False
    try:
        layer = kind(4, 3, device="cpu")
        x = torch.arange(8, dtype=torch.float32, device="cpu").view(2, 4)
        return bool(torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias)))
    except Exception:  # another constructor, or another forward
        return False
