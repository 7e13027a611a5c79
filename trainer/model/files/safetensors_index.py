"""The location of each tensor in a model's safetensors files, read from their headers and the index.

Any run of a flattened tensor's elements is one range of bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from trainer.errors import InputError
from trainer.model.files.safetensors_header import SHOWN, header_of
from trainer.model.files.weight_check import names_shown, needed_files
from trainer.model.files.weight_source import WeightSource

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


Range = tuple["TensorLocation", int, int]
"""Elements of a stored tensor, from the first up to the last, which is not one of them."""


@dataclass(frozen=True)
class TensorLocation:
    """One tensor in a file; ``start`` is the position of its first byte."""

    file: str
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def parts(self) -> tuple[TensorLocation, ...]:
        return (self,)

    def ranges(self, first: int, last: int) -> Iterator[Range]:
        """Yields the stored ranges of elements ``first`` to ``last``."""
        yield self, first, last


@dataclass(frozen=True)
class JoinedLocation:
    """Stored tensors that are one tensor of ``shape`` in the model: joined end to end when they are flattened."""

    parts: tuple[TensorLocation, ...]
    shape: tuple[int, ...]

    @property
    def file(self) -> str:
        return self.parts[0].file

    @property
    def start(self) -> int:
        return self.parts[0].start

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    @property
    def numel(self) -> int:
        return sum(part.numel for part in self.parts)

    @property
    def bytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def ranges(self, first: int, last: int) -> Iterator[Range]:
        """Yields the stored ranges of elements ``first`` to ``last``."""
        size = self.parts[0].numel  # all have one shape
        for number in range(first // size, -(-last // size)):
            start = number * size
            yield self.parts[number], max(first, start) - start, min(last, start + size) - start


Location = TensorLocation | JoinedLocation


def read_headers(source: WeightSource, path: str) -> dict[str, TensorLocation]:
    """Returns all tensors of the model by their names in the files, in the order of the files.

    Raises InputError when there are no safetensors, or a file is missing or torn.
    """
    needed = sorted(needed_files(source.storage, path, source.files))
    missing = [name for name in needed if name not in source.files]
    if missing:
        raise InputError(f"model.path {path!r} lacks weight files ({names_shown(missing)}); copy the model again")
    found: dict[str, TensorLocation] = {}
    for file in needed:
        found.update(_tensors(source, file))
    return found


def _tensors(source: WeightSource, file: str) -> dict[str, TensorLocation]:
    uri = source.storage.uri(file)
    entries = header_of(partial(source.read, file), source.size(file), uri)
    odd = next((name for name, entry in entries.items() if entry.dtype not in DTYPES), None)
    if odd is not None:
        raise InputError(f"{uri} holds {odd[:SHOWN]!r} in {entries[odd].dtype}, a type that a sharded load lacks")
    return {n: TensorLocation(file, entry.start, DTYPES[entry.dtype], entry.shape) for n, entry in entries.items()}
