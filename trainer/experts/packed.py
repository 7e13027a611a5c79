"""Experts in NF4: bitsandbytes' parametrisation of one parameter, read one expert at a time.

``experts.gate_up_proj`` stays the dequantised tensor for whoever reads it. Dequantised at once, a layer's experts would
need four times their packed memory, so that `trainer.experts.compute` reads those that have tokens in turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from bitsandbytes.nn.parametrize import Bnb4bitParametrization
from torch.nn.utils import parametrize

from trainer.nf4 import BLOCK, dequantise_block, full_absmax, quantise_4bit


class PackedExperts(Bnb4bitParametrization):
    """The packed form of a parameter of shape [E, …, …]. ``quant_state``: of the complete parameter."""

    quant_state: Any

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.quant_state.shape)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.quant_state.dtype
        return dtype

    @torch.no_grad()
    def forward(self, quantized_param: torch.Tensor) -> torch.Tensor:
        """Returns the dequantised parameter."""
        # Flat: bitsandbytes' kernel for CPUs takes the rows' length for a multiple of the block.
        codes, absmax = quantized_param.view(torch.uint8).view(-1), full_absmax(self.quant_state)
        return dequantise_block(codes, absmax, self.quant_state, 0, self.shape.numel()).view(self.shape)

    @torch.no_grad()
    def experts(self, packed: torch.Tensor, numbers: list[int]) -> Iterator[torch.Tensor]:
        """Yields the dequantised matrix of each of these experts."""
        size = self.shape[1:].numel()
        if size % BLOCK:  # a block holds elements of two experts; such experts are small
            whole = self.forward(packed)
            yield from (whole[number] for number in numbers)
            return
        absmax, codes = full_absmax(self.quant_state), packed.view(torch.uint8).view(-1)
        for number in numbers:
            first = number * size
            yield dequantise_block(codes, absmax, self.quant_state, first, first + size).view(self.shape[1:])


def packed_in(module: torch.nn.Module) -> dict[str, PackedExperts]:
    """Returns the packed parameters of a module, by attribute."""
    parametrised: Any = getattr(module, "parametrizations", None) or {}
    return {name: ps[0] for name, ps in parametrised.items() if isinstance(ps[0], PackedExperts)}


def packed_experts(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Parameter, PackedExperts]]:
    """Yields each packed parameter of a model, with its packing."""
    for module in model.modules():
        for attribute, packing in packed_in(module).items():
            lists: Any = module.parametrizations
            yield lists[attribute].original, packing


def pack_experts(owner: torch.nn.Module, attribute: str, storage: torch.dtype) -> None:
    """Quantises a parameter to NF4 on its device (meta included). ``storage``: the type that holds the packed bytes."""
    packed, state = quantise_4bit(owner.get_parameter(attribute).data, storage)
    _put_packed(owner, attribute, torch.nn.Parameter(packed, requires_grad=False), PackedExperts(state))


def _put_packed(owner: torch.nn.Module, attribute: str, packed: torch.nn.Parameter, packing: PackedExperts) -> None:
    owner._parameters[attribute] = packed
    # ``unsafe``: the parametrisation changes shape and type.
    parametrize.register_parametrization(owner, attribute, packing, unsafe=True)


@contextmanager
def unpacked_shapes(model: torch.nn.Module) -> Iterator[None]:
    """Shows packed experts to peft, which reads their shapes: unpacked, without values or memory, in the context."""
    owners = [(module, a, packing) for module in model.modules() for a, packing in packed_in(module).items()]
    packed = []
    for owner, attribute, packing in owners:
        parametrize.remove_parametrizations(owner, attribute, leave_parametrized=False)
        packed.append(owner.get_parameter(attribute))
        empty = torch.empty(1, dtype=packing.dtype, device=packed[-1].device).expand(packing.shape)
        owner._parameters[attribute] = torch.nn.Parameter(empty, requires_grad=False)
    try:
        yield
    finally:
        for (owner, attribute, packing), parameter in zip(owners, packed, strict=True):
            _put_packed(owner, attribute, parameter, packing)
