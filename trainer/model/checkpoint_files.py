"""Which tensor lies where in a model's safetensors files, told by their headers and the index.

A safetensors file is eight bytes with the header's length, the header (JSON: each tensor's type, shape and offsets),
and the tensors, each contiguous and in row-major order: any run of a flattened tensor's elements is a range of bytes.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from trainer.errors import CorruptObject, InputError
from trainer.model.source import Source
from trainer.model.weights import LARGEST_HEADER, Entry, needed_files, read_header

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """One tensor in a file; ``start`` is its first byte's position."""

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


def read_headers(source: Source, path: str) -> dict[str, Stored]:
    """All tensors of the model by their names in the files, in the order of the files.

    Raises InputError when there are no safetensors, or a file is missing or torn.
    """
    needed = sorted(needed_files(source.storage, path, source.files))
    missing = [name for name in needed if name not in source.files]
    if missing:
        raise InputError(f"model.path {path!r} lacks weight files ({', '.join(missing[:3])}); copy the model again")
    found: dict[str, Stored] = {}
    for file in needed:
        found.update(_tensors(source, file))
    return found


def _tensors(source: Source, file: str) -> dict[str, Stored]:
    try:
        base, entries = _header(source, file)
        found = {n: _stored(file, base, e) for n, e in entries.items()}
        extents = {n: e["data_offsets"] for n, e in entries.items()}
        whole = all(extent.stop - extent.start == found[n].bytes for n, extent in extents.items())
        end = base + max((extent.stop for extent in extents.values()), default=0)
    except (ValueError, struct.error, KeyError, CorruptObject) as error:
        raise InputError(f"{source.storage.uri(file)} has no readable header; copy the model again") from error
    if not whole or end != source.size(file):
        raise InputError(
            f"{source.storage.uri(file)} is torn: it has {source.size(file)} bytes, and its header speaks of {end}; "
            "copy the model again"
        )
    return dict(sorted(found.items(), key=lambda item: item[1].start))


def _header(source: Source, file: str) -> tuple[int, Mapping[str, Entry]]:
    (length,) = struct.unpack("<Q", source.read(file, 0, 8))
    if length > min(source.size(file) - 8, LARGEST_HEADER):
        raise ValueError(f"header of {length} bytes")
    return 8 + length, read_header(source.read(file, 8, 8 + length))


def _stored(file: str, base: int, entry: Entry) -> Stored:
    return Stored(file, base + entry["data_offsets"].start, DTYPES[entry["dtype"]], tuple(entry["shape"]))
