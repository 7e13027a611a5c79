"""Reading and writing of states that are quantised block by block.

A codec turns the state of one tensor into plain tensors, the raw form, which can be stored, and into the values of its
moments. A block never crosses the end of a tensor, so the raw form belongs to one division of a parameter into parts:
`restore` gives the same bytes for the same part, and `fill` quantises the values for any other one.

``state``: the optimizer's own dictionary for one tensor, whose entries exist. Scalars (a step counter) are no part of
the raw form.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch

State = dict[str, Any]
Raw = Mapping[str, torch.Tensor]


class Codec(ABC):
    @abstractmethod
    def raw(self, state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Returns the entries that are not scalars as plain tensors, without copying them."""

    @abstractmethod
    def is_quantised(self, raw: Raw) -> bool: ...

    @abstractmethod
    def values(self, raw: Raw) -> dict[str, torch.Tensor]:
        """Returns the flat float32 values of each moment."""

    @abstractmethod
    def fill(self, state: State, values: Mapping[str, torch.Tensor]) -> None:
        """Writes values of the moments into the state, quantised as the state is."""

    def restore(self, state: State, saved: Raw) -> bool:
        """Copies a saved raw form into the state; returns False, and copies nothing, if the state has another form."""
        mine = self.raw(state)
        if any(k not in saved or (v.dtype, v.shape) != (saved[k].dtype, saved[k].shape) for k, v in mine.items()):
            return False
        for key, tensor in mine.items():
            tensor.copy_(saved[key])
        return True


class Bitsandbytes(Codec):
    """``state1``, ``state2``: codes with the scales ``absmax1``, ``absmax2``, or float32 values. The tables of code
    values (``qmap1``, ``qmap2``) are constants of the library."""

    BLOCK = 256

    def raw(self, state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        tensors = {key: v for key, v in state.items() if isinstance(v, torch.Tensor) and v.ndim}
        return {key: v for key, v in tensors.items() if not key.startswith("qmap")}

    def is_quantised(self, raw: Raw) -> bool:
        return "absmax1" in raw

    def values(self, raw: Raw) -> dict[str, torch.Tensor]:
        import bitsandbytes.functional as F

        def of(number: str) -> torch.Tensor:
            codes = raw[f"state{number}"].reshape(-1)
            if not self.is_quantised(raw):
                return codes
            table = F.create_dynamic_map(signed=number == "1").to(codes.device)
            values: torch.Tensor = F.dequantize_blockwise(
                codes, absmax=raw[f"absmax{number}"], code=table, blocksize=self.BLOCK
            )
            return values

        return {f"state{number}": of(number) for number in "12" if f"state{number}" in raw}

    def fill(self, state: State, values: Mapping[str, torch.Tensor]) -> None:
        import bitsandbytes.functional as F

        for key, flat in values.items():
            number, flat = key[-1], flat.to(state[key].device)
            if f"absmax{number}" in state:
                flat, scales = F.quantize_blockwise(flat, code=state[f"qmap{number}"], blocksize=self.BLOCK)
                state[f"absmax{number}"].copy_(scales.absmax)
            state[key].copy_(flat.view(state[key].shape))


class Torchao(Codec):
    """``exp_avg`` and ``exp_avg_sq``: a tensor subclass that holds codes and scales, or float32 values."""

    PARTS = ("codes", "scale")

    def raw(self, state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for key, value in state.items():
            if hasattr(value, "codes"):
                found |= {f"{key}:{part}": getattr(value, part) for part in self.PARTS}
            elif isinstance(value, torch.Tensor) and value.ndim:
                found[key] = value
        return found

    def is_quantised(self, raw: Raw) -> bool:
        return any(key.endswith(":codes") for key in raw)

    def values(self, raw: Raw) -> dict[str, torch.Tensor]:
        found = {key: value.reshape(-1) for key, value in raw.items() if ":" not in key}
        for key in (key.removesuffix(":codes") for key in raw if key.endswith(":codes")):
            codes, scale = raw[f"{key}:codes"].reshape(-1), raw[f"{key}:scale"]
            form = self.zeros(codes, scale, key == "exp_avg")
            form.codes.copy_(codes)
            form.scale.copy_(scale)
            found[key] = form.dequantize().reshape(-1)
        return found

    def fill(self, state: State, values: Mapping[str, torch.Tensor]) -> None:
        for key, flat in values.items():
            state[key].copy_(flat.to(state[key].device).view(state[key].shape))

    @abstractmethod
    def zeros(self, codes: torch.Tensor, scale: torch.Tensor, signed: bool) -> Any:
        """Returns a state of zeros with as many codes and scales."""


class Torchao8bit(Torchao):
    def zeros(self, codes: torch.Tensor, scale: torch.Tensor, signed: bool) -> Any:
        from torchao.optim.subclass_8bit import OptimState8bit

        size = codes.numel()
        return OptimState8bit.zeros((size,), signed, size // scale.numel(), codes.device)


class Torchao4bit(Torchao):
    def zeros(self, codes: torch.Tensor, scale: torch.Tensor, signed: bool) -> Any:
        from torchao.optim.subclass_4bit import OptimState4bit

        size = 2 * codes.numel()  # two codes in a byte
        return OptimState4bit.zeros((size,), signed, size // scale.numel(), codes.device)


class TorchaoFp8(Torchao):
    def zeros(self, codes: torch.Tensor, scale: torch.Tensor, signed: bool) -> Any:
        from torchao.optim.subclass_fp8 import OptimStateFp8

        size = codes.numel()
        return OptimStateFp8.zeros((size,), size // scale.numel(), codes.device)
