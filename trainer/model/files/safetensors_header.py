"""Reads the header of a safetensors file strictly, since the file is not trusted.

A file is eight bytes with the header's length, the header (JSON: each tensor's type, shape and offsets), and the
tensors one after the other, without holes, each contiguous and in row-major order.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from trainer.errors import InputError
from trainer.parsing import Malformed, parse_json

LARGEST_HEADER = 32 * 2**20
"""In bytes: about 200,000 tensors. safetensors itself accepts 100 MiB, for which Python's JSON needs gigabytes."""
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64, "F16": 16,
    "BF16": 16, "F32": 32, "F64": 64, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
"""Bits per element, by safetensors' names of types."""
SHOWN = 80
METADATA = "__metadata__"


class Entry(NamedTuple):
    """One tensor, stored in bytes ``start`` to ``stop`` of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class BadHeader(Exception):
    """The file is not a complete safetensors file; ``str`` is what was found instead."""


def read_header(read: Callable[[int, int], bytes], size: int) -> dict[str, Entry]:
    """Returns the tensors of a file of ``size`` bytes by name, in file order; ``read(start, stop)`` returns its bytes.

    Raises BadHeader. Memory: a few times `LARGEST_HEADER`."""
    if size < 8:
        raise BadHeader(f"it has {size} bytes and no readable header")
    (length,) = struct.unpack("<Q", read(0, 8))
    if length > size - 8:
        raise BadHeader(f"it has {size} bytes and no readable header (which would have {length})")
    if length > LARGEST_HEADER:
        raise BadHeader(f"its header has {length} bytes, and {LARGEST_HEADER} are read at most")
    try:
        header = parse_json(read(8, 8 + length), finite=False)
    except Malformed:
        raise BadHeader(f"it has {size} bytes and no readable header") from None
    if not isinstance(header, dict):
        raise BadHeader(f"it has {size} bytes and no readable header")
    entries = [(name, _entry(name, given, 8 + length)) for name, given in header.items() if name != METADATA]
    entries.sort(key=lambda item: item[1].start)
    _check_contiguous(entries, 8 + length, size)
    return dict(entries)


def header_of(read: Callable[[int, int], bytes], size: int, uri: str) -> dict[str, Entry]:
    """Reads the header of the model file ``uri`` with `read_header`; raises InputError instead of BadHeader."""
    try:
        return read_header(read, size)
    except BadHeader as reason:
        raise InputError(f"{uri} is torn: {reason}; copy the model again") from None


def _entry(name: str, given: Any, base: int) -> Entry:
    shown = f"its tensor {name[:SHOWN]!r}"
    if not isinstance(given, Mapping):
        raise BadHeader(f"{shown} is no mapping in the header")
    dtype, shape, offsets = given.get("dtype"), _sizes(given.get("shape")), _sizes(given.get("data_offsets"))
    if not isinstance(dtype, str) or dtype not in BITS:
        raise BadHeader(f"{shown} is of the unknown type {str(dtype)[:SHOWN]!r}")
    if shape is None:
        raise BadHeader(f"{shown} has the invalid shape {str(given.get('shape'))[:SHOWN]}")
    if offsets is None or len(offsets) != 2 or offsets[1] < offsets[0]:
        raise BadHeader(f"{shown} has the invalid data_offsets {str(given.get('data_offsets'))[:SHOWN]}")
    bits = math.prod(shape) * BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        raise BadHeader(f"{shown} has the shape {str(shape)[:SHOWN]} in {offsets[1] - offsets[0]} bytes")
    return Entry(dtype, tuple(shape), base + offsets[0], base + offsets[1])


def _sizes(value: Any) -> list[int] | None:
    """Returns ``value`` if it is a list of sizes, else None."""
    # Not isinstance(number, int): true and false are ints in Python.
    if not isinstance(value, list) or not all(type(number) is int and 0 <= number < 2**63 for number in value):
        return None
    return value


def _check_contiguous(entries: list[tuple[str, Entry]], base: int, size: int) -> None:
    end = max((entry.stop for _, entry in entries), default=base)
    if end != size:
        raise BadHeader(f"it has {size} bytes, and its header describes {end}")
    at = base
    for name, entry in entries:
        if entry.start != at:
            what = "overlaps another" if entry.start < at else "begins after a gap"
            raise BadHeader(f"its tensor {name[:SHOWN]!r} {what}, at byte {entry.start}")
        at = entry.stop
