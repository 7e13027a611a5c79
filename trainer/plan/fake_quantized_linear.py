"""Substitutes for quantised linear layers and experts, which allocate the same bytes without bitsandbytes' kernels.

These kernels do not run under fake tensors. The substitutes hold the same packed weight, and allocate the dequantised
weight in the forward and again in the backward, as bitsandbytes does: of a linear layer, or of one expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt

from trainer.experts import PackedExperts, packed_experts


class PackedLinear(torch.nn.Linear):
    """A frozen linear layer whose weight is ``packed``. ``weight``: the dequantised weight, allocated at each access.

    ``quant_state_bytes``: size of the quantisation state, which no strategy shards."""

    def __init__(self, like: torch.nn.Linear, dtype: torch.dtype) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features, self.dtype = like.in_features, like.out_features, dtype
        if isinstance(like, Linear4bit):
            self.packed, self.quant_state_bytes = _frozen(like.weight), _state_bytes(like.quant_state)
        else:
            codes = torch.empty(like.out_features, like.in_features, dtype=torch.int8, device="meta")
            self.packed, self.quant_state_bytes = _frozen(codes), like.out_features * torch.float32.itemsize
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


class FakeExperts(PackedExperts):
    """Packed experts whose dequantised values are only allocated."""

    def forward(self, quantized_param: torch.Tensor) -> torch.Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=quantized_param.device)

    def experts(self, packed: torch.Tensor, numbers: list[int]) -> Iterator[torch.Tensor]:
        for _ in numbers:
            yield torch.empty(self.shape[1:], dtype=self.dtype, device=packed.device)


class PackedSize(NamedTuple):
    """Elements that are packed, elements of the tensors that hold them, and bytes of their quantisation state."""

    elements: int
    stored: int
    state_bytes: int


def packed_sizes(model: torch.nn.Module) -> Iterator[PackedSize]:
    """Yields the size of each packed weight of a model with substitutes."""
    for module in model.modules():
        if isinstance(module, PackedLinear):
            yield PackedSize(module.in_features * module.out_features, module.packed.numel(), module.quant_state_bytes)
    for parameter, experts in packed_experts(model):
        yield PackedSize(experts.shape.numel(), parameter.numel(), _state_bytes(experts.quant_state))


def _state_bytes(state: Any) -> int:
    tensors = (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
    return sum(t.numel() * t.element_size() for t in tensors)


def _frozen(packed: torch.Tensor) -> torch.nn.Parameter:
    # A plain parameter: bitsandbytes' own classes would quantise again.
    return torch.nn.Parameter(torch.empty(packed.shape, dtype=packed.dtype, device="meta"), requires_grad=False)


def stand_in(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Replaces the quantised layers and experts of ``model``; ``dtype``: the type in which layers compute."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear4bit | Linear8bitLt):
            model.set_submodule(name, PackedLinear(module, dtype))
    for _, experts in packed_experts(model):
        experts.__class__ = FakeExperts
