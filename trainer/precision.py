"""Computing in 16 bits with or without torch's autocast.

Trained parameters are float32, and frozen ones have the recipe's dtype. Autocast casts the operands of each operation;
and peft casts the input of each LoRA layer to the adapter's float32, which autocast then undoes. Where only LoRA's
matrices have another dtype than the model, neither cast is needed: the matrices are cast to the dtype of their input
where they are used. The products are equal to the last bit, and no activation is copied. (Dropout then rounds in 16
bits, as it does in peft's 4-bit layers.)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


class InDtypeOfInput(torch.nn.Linear):
    """A linear layer whose float32 parameters are cast to the dtype of its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return torch.nn.functional.linear(x, self.weight.to(x.dtype), bias)


def cast_where_used(model: torch.nn.Module) -> None:
    """Makes every plain LoRA layer, which computes W x + (alpha / r) B A x, cast its matrices and not its input."""
    layers: Iterable[Any] = model.modules()
    for layer in layers:
        if _is_plain_lora(layer):
            layer.cast_input_dtype_enabled = False
            for linear in (*layer.lora_A.values(), *layer.lora_B.values()):
                linear.__class__ = InDtypeOfInput


def needs_autocast(model: torch.nn.Module, dtype: torch.dtype) -> bool:
    """Returns whether a forward in ``dtype`` uses parameters of another dtype that `cast_where_used` does not cast."""
    cast = {id(p) for m in model.modules() if isinstance(m, InDtypeOfInput) for p in m.parameters(recurse=False)}
    return any(p.is_floating_point() and p.dtype != dtype and id(p) not in cast for p in model.parameters())


def _is_plain_lora(layer: Any) -> bool:
    from peft.tuners.lora import bnb
    from peft.tuners.lora import layer as lora

    # peft defines Linear4bit only where bitsandbytes is installed.
    if (
        type(layer) not in (lora.Linear, lora.ParamWrapper, getattr(bnb, "Linear4bit", lora.Linear))
        or layer.lora_variant
    ):
        return False
    return all(type(linear) is torch.nn.Linear for linear in (*layer.lora_A.values(), *layer.lora_B.values()))
