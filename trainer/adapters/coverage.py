"""The shares of a base model's weights that have an adapter, and that are quantised."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from trainer.adapters.meta_init import COPY
from trainer.adapters.peft_targets import attached_targets
from trainer.experts import packed_experts


class Coverage(NamedTuple):
    """Elements of the base model's weights, before quantisation: all, those of layers that have an adapter (or are
    trained themselves), and those that are quantised."""

    weights: int
    adapted: int
    quantised: int

    @property
    def adapted_share(self) -> float:
        return self.adapted / max(1, self.weights)

    @property
    def quantised_share(self) -> float:
        return self.quantised / max(1, self.weights)


def coverage_of(model: torch.nn.Module) -> Coverage:
    """Counts the weights of a model with its adapter, before a strategy shards them."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    layers: list[Any] = [m for m in model.modules() if isinstance(m, Linear4bit | Linear8bitLt)]
    packed = {id(layer.weight): layer.in_features * layer.out_features for layer in layers}
    packed |= {id(parameter): experts.shape.numel() for parameter, experts in packed_experts(model)}
    whole: Any = model
    base = whole.get_base_model() if hasattr(whole, "get_base_model") else whole
    added = _added(model)
    own = [p for name, p in base.named_parameters() if id(p) not in added and COPY not in name]
    trained = sum(p.numel() for p in own if p.requires_grad)
    return Coverage(
        sum(packed.get(id(p), p.numel()) for p in own), adapted_elements(model) + trained, sum(packed.values())
    )


def adapted_elements(model: torch.nn.Module) -> int:
    """Returns the number of elements of the weights that have an adapter."""
    return sum(_elements(model.get_submodule(name)) for name in attached_targets(model))


def _elements(layer: Any) -> int:
    base = layer.get_base_layer()
    if getattr(layer, "num_experts", 1) > 1:  # peft's wrapper of a parameter
        return int(layer.num_experts * layer.in_features * layer.out_features)
    if hasattr(base, "in_features"):  # a packed weight has another shape
        return int(base.in_features * base.out_features)
    return int(base.weight.numel()) if hasattr(base, "weight") else 0


def _added(model: torch.nn.Module) -> set[int]:
    """Returns the parameters that peft's layers have added, by ``id``."""
    found: set[int] = set()
    for layer in model.modules():
        for attribute in (*getattr(layer, "adapter_layer_names", ()), *getattr(layer, "other_param_names", ())):
            part = getattr(layer, attribute, None)
            if isinstance(part, torch.nn.ModuleDict | torch.nn.ParameterDict):
                found |= {id(parameter) for parameter in part.parameters()}
    return found
