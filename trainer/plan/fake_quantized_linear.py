"""Substitutes for quantised linear layers, which allocate the same bytes without bitsandbytes' kernels.

These kernels do not run under fake tensors. The substitutes hold the same packed weight, and allocate the dequantised
weight in the forward and again in the backward, as bitsandbytes does.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt


class PackedLinear(torch.nn.Linear):
    """A frozen linear layer whose weight is ``packed``. ``weight``: the dequantised weight, allocated at each access.

    ``quant_state_bytes``: size of the quantisation state, which no strategy shards."""

    def __init__(self, like: torch.nn.Linear, dtype: torch.dtype) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features, self.dtype = like.in_features, like.out_features, dtype
        self.packed, self.quant_state_bytes = _packed(like)
        self.bias = like.bias

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]  # elsewhere it is a parameter
        return torch.empty(self.out_features, self.in_features, dtype=self.dtype, device=self.packed.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = _Product.apply(x.to(self.dtype), self)  # type: ignore[no-untyped-call]
        return product if self.bias is None else product + self.bias


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: PackedLinear) -> torch.Tensor:
        ctx.layer = layer
        return x @ layer.weight.t()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0] @ ctx.layer.weight.to(gradients[0].dtype), None


def _packed(layer: torch.nn.Linear) -> tuple[torch.nn.Parameter, int]:
    if isinstance(layer, Linear4bit):
        state: Any = layer.quant_state
        tensors = (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
        return _frozen(layer.weight), sum(t.numel() * t.element_size() for t in tensors)
    codes = torch.empty(layer.out_features, layer.in_features, dtype=torch.int8, device="meta")
    return _frozen(codes), layer.out_features * torch.float32.itemsize


def _frozen(packed: torch.Tensor) -> torch.nn.Parameter:
    # A plain parameter: bitsandbytes' own classes would quantise again.
    return torch.nn.Parameter(torch.empty(packed.shape, dtype=packed.dtype, device="meta"), requires_grad=False)


def stand_in(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Replaces the quantised layers of ``model``; ``dtype``: the type in which they compute."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear4bit | Linear8bitLt):
            model.set_submodule(name, PackedLinear(module, dtype))
