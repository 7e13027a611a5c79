"""Weights that are stored as fp8 or mxfp4, dequantised while they are read, all or any run of their elements.

fp8 (DeepSeek-V3, arXiv:2412.19437): a weight of 8-bit floats, and a scale for each block of [128, 128] elements; the
last block of a row or column may be smaller. mxfp4 (OCP Microscaling 1.0, as gpt-oss stores its experts): groups of 32
4-bit floats with one power of two, of the transposed weight. transformers' dequantisation is not used: it takes blocks
to divide the weight evenly, and reads whole tensors only.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.errors import InputError
from trainer.model.files.safetensors_index import TensorLocation, read_headers
from trainer.model.files.weight_source import WeightSource

GROUP, GROUP_BYTES = 32, 16
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
EXPONENT_BIAS = 127
CHUNK = 2**24
"""Elements that are dequantised at a time: each needs about 12 bytes of memory."""

Read = Callable[[TensorLocation, int, int], torch.Tensor]
"""Returns elements ``start`` to ``stop`` of a flattened stored tensor, as they are stored."""


@dataclass(frozen=True)
class QuantisedLocation(TensorLocation):
    """A weight that is stored quantised; ``shape`` is that of the weight."""

    @property
    @abstractmethod
    def unit(self) -> int:
        """Returns the number of consecutive elements that are dequantised together."""

    @abstractmethod
    def spans(self, first: int, last: int) -> Iterable[tuple[int, int]]:
        """Divides the units ``first`` to ``last`` into runs of units that are read at a time."""

    @abstractmethod
    def stored(self, first: int, last: int) -> Iterator[tuple[TensorLocation, int, int]]:
        """Yields the runs of stored elements that hold these units."""

    @abstractmethod
    def values(self, read: Read, first: int, last: int) -> torch.Tensor:
        """Returns the elements of these units in float32."""

    def units(self, start: int, stop: int) -> tuple[int, int]:
        """Returns the units that hold elements ``start`` to ``stop`` of the flattened weight."""
        return start // self.unit, math.ceil(stop / self.unit)


@dataclass(frozen=True)
class Fp8Location(QuantisedLocation):
    """``scale``: one value for each block of ``block`` rows and columns. A unit is a row."""

    scale: TensorLocation
    block: tuple[int, int]

    @property
    def unit(self) -> int:
        return self.shape[-1]

    def spans(self, first: int, last: int) -> Iterable[tuple[int, int]]:
        return ((first, last),)

    def stored(self, first: int, last: int) -> Iterator[tuple[TensorLocation, int, int]]:
        yield self, first * self.unit, last * self.unit
        yield self.scale, 0, self.scale.numel

    def values(self, read: Read, first: int, last: int) -> torch.Tensor:
        weight, scale = (read(*run) for run in self.stored(first, last))
        (rows, columns), (high, wide) = self.shape[-2:], self.block
        row = torch.arange(first, last)
        # The blocks of each matrix of a stack begin at its own first row.
        block = row // rows * math.ceil(rows / high) + row % rows // high
        scales = scale.float().view(-1, math.ceil(columns / wide))[block].repeat_interleave(wide, -1)[:, :columns]
        return (weight.view(-1, columns).float() * scales).view(-1)


@dataclass(frozen=True)
class Mxfp4Location(QuantisedLocation):
    """A stack of matrices [in, out]: ``blocks`` [.., out, in / 32, 16 bytes], ``scales`` [.., out, in / 32] hold them
    transposed. A unit is a matrix."""

    blocks: TensorLocation
    scales: TensorLocation

    @property
    def unit(self) -> int:
        return math.prod(self.shape[-2:])

    def spans(self, first: int, last: int) -> Iterable[tuple[int, int]]:
        return ((number, number + 1) for number in range(first, last))

    def stored(self, first: int, last: int) -> Iterator[tuple[TensorLocation, int, int]]:
        for part in (self.blocks, self.scales):
            each = part.numel // (self.numel // self.unit)
            yield part, first * each, last * each

    def values(self, read: Read, first: int, last: int) -> torch.Tensor:
        codes, exponents = (read(*run) for run in self.stored(first, last))
        table, (rows, columns) = torch.tensor(FP4), self.shape[-2:]
        pairs = torch.stack((table[(codes & 15).int()], table[(codes >> 4).int()]), -1).view(-1, GROUP)
        values = torch.ldexp(pairs, exponents.int().view(-1, 1) - EXPONENT_BIAS)
        return values.view(-1, columns, rows).transpose(1, 2).reshape(-1)


class WeightReader:
    """Reads runs of a weight's elements. Keeps the units that it has dequantised last: the next run may need them."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source
        self._kept: tuple[Any, torch.Tensor] = (None, torch.empty(0))

    def values(self, place: TensorLocation, start: int, stop: int) -> torch.Tensor:
        """Returns elements ``start`` to ``stop`` of the flattened weight, as stored or dequantised to float32."""
        if not isinstance(place, QuantisedLocation):
            return self._stored(place, start, stop)
        parts = []
        for first, last in place.spans(*place.units(start, stop)):
            if self._kept[0] != (place, first, last):
                self._kept = (place, first, last), place.values(self._stored, first, last)
            begin = first * place.unit
            parts.append(self._kept[1][max(0, start - begin) : stop - begin])
        return torch.cat(parts) if parts else torch.empty(0)

    def _stored(self, place: TensorLocation, start: int, stop: int) -> torch.Tensor:
        raw = torch.empty((stop - start) * place.dtype.itemsize, dtype=torch.uint8)
        array: Any = raw.numpy()
        self._source.read_into(place.file, place.start + start * place.dtype.itemsize, memoryview(array))
        return raw.view(place.dtype)


def locate_weights(
    stored: Mapping[str, TensorLocation], settings: Mapping[str, Any] | None, path: str
) -> dict[str, TensorLocation]:
    """Returns the tensors in the files; those that are dequantised while they are read, under their weights' names.

    ``settings``: the base's quantization_config. Raises InputError when the files do not hold what it says."""
    find = METHODS.get(str(settings.get("quant_method"))) if settings else None
    return dict(find(stored, settings, path)) if find else dict(stored)


def _fp8(stored: Mapping[str, TensorLocation], settings: Any, path: str) -> Iterator[tuple[str, TensorLocation]]:
    for name, place in stored.items():
        if name.endswith(("_scale_inv", ".activation_scale")):
            continue
        if place.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
            yield name, place
            continue
        block = settings.get("weight_block_size", [128, 128])
        scale = stored.get(f"{name}_scale_inv")
        match block, place.shape:
            case [int(high), int(wide)], (*stack, rows, columns) if high > 0 and wide > 0:
                blocks = math.prod(stack) * math.ceil(rows / high) * math.ceil(columns / wide)
            case None, (*stack, high, wide):  # one scale for each matrix
                blocks = math.prod(stack)
            case _:
                blocks = 0
        if scale is None or not blocks or scale.numel != blocks:
            raise InputError(
                f"model.path {path!r} holds {name} in 8 bits without a scale for each of its blocks (weight_block_size "
                f"{block}); copy the model again, or name the unquantised one"
            )
        yield name, Fp8Location(place.file, place.start, place.dtype, place.shape, scale, (high, wide))


def _mxfp4(stored: Mapping[str, TensorLocation], settings: Any, path: str) -> Iterator[tuple[str, TensorLocation]]:
    for name, place in stored.items():
        weight, _, part = name.rpartition("_")
        scales = stored.get(f"{weight}_scales")
        if part == "blocks":
            if scales is None or place.dtype != torch.uint8 or place.shape != (*scales.shape, GROUP_BYTES):
                raise InputError(f"model.path {path!r} holds {name} without its scales; copy the model again")
            *stack, columns, groups, _ = place.shape
            shape = (*stack, groups * GROUP, columns)
            yield weight, Mxfp4Location(place.file, place.start, place.dtype, shape, place, scales)
        elif part != "scales" or f"{weight}_blocks" not in stored:
            yield name, place


METHODS = {"fp8": _fp8, "mxfp4": _mxfp4}


def dequantised_weights(
    folder: Path, settings: Mapping[str, Any] | None, path: str, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Reads all weights in ``folder`` by their names in the files; those that are stored quantised are in ``dtype``."""
    with closing(WeightSource(str(folder))) as source:
        places, reader = locate_weights(read_headers(source, path), settings, path), WeightReader(source)
        return {name: _complete(reader, place, dtype) for name, place in places.items()}


def _complete(reader: WeightReader, place: TensorLocation, dtype: torch.dtype) -> torch.Tensor:
    if not isinstance(place, QuantisedLocation):
        return reader.values(place, 0, place.numel).view(place.shape)
    values = torch.empty(place.numel, dtype=dtype)
    for start in range(0, place.numel, CHUNK):
        stop = min(place.numel, start + CHUNK)
        values[start:stop] = reader.values(place, start, stop)
    return values.view(place.shape)
