"""Computing in 16 bits with or without torch's autocast.

What is trained is kept in float32, and what is frozen in the recipe's dtype. Autocast casts whatever meets, at each
operation; and peft casts the input of each LoRA layer to the adapter's float32, which autocast then undoes. Where
nothing but LoRA's matrices is in another dtype than the model, neither is needed: these are cast to that of their input
where they are used, the products are the same to the last bit, and no activation is copied. (Dropout then rounds in 16
bits, as it does in peft's 4-bit layers.)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


class InDtypeOfInput(torch.nn.Linear):
    """A linear layer whose float32 parameters take part in the dtype of what it is given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return torch.nn.functional.linear(x, self.weight.to(x.dtype), bias)


def cast_where_used(model: torch.nn.Module) -> None:
    """Has every LoRA layer that computes W x + (alpha / r) B A x, and no more, cast its matrices and not its input."""
    layers: Iterable[Any] = model.modules()
    for layer in layers:
        if _is_plain_lora(layer):
            layer.cast_input_dtype_enabled = False
            for linear in (*layer.lora_A.values(), *layer.lora_B.values()):
                linear.__class__ = InDtypeOfInput


def needs_autocast(model: torch.nn.Module, dtype: torch.dtype) -> bool:
    """Whether a forward in ``dtype`` meets parameters of another one, other than those that `cast_where_used` casts."""
    cast = {id(p) for m in model.modules() if isinstance(m, InDtypeOfInput) for p in m.parameters(recurse=False)}
    return any(p.is_floating_point() and p.dtype != dtype and id(p) not in cast for p in model.parameters())


def _is_plain_lora(layer: Any) -> bool:
    from peft.tuners.lora import layer as lora

    kinds: tuple[type, ...] = (lora.Linear, *_four_bit())
    if type(layer) not in kinds or layer.lora_variant:
        return False
    return all(type(linear) is torch.nn.Linear for linear in (*layer.lora_A.values(), *layer.lora_B.values()))


def _four_bit() -> tuple[type, ...]:
    """peft's own class exists only where bitsandbytes does."""
    from peft.tuners.lora import bnb

    found = getattr(bnb, "Linear4bit", None)
    return (found,) if found else ()
