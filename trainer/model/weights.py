"""Whether a model's weight files are whole, told by their headers: no weights are read.

A safetensors file is eight bytes with the header's length, the header (JSON: each tensor's offsets), and the tensors.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypedDict

from trainer.errors import InputError
from trainer.parsing import Malformed, parse_json
from trainer.recipe.model import ModelSection
from trainer.records import Count, read_record
from trainer.storage import ObjectInfo, Storage, open_storage

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
LARGEST_HEADER = 100 * 2**20  # safetensors' own limit
_PARALLEL_READS = 8


def check_weights(section: ModelSection) -> None:
    """Raises InputError when weight files of a folder or URL are missing or torn. What comes from the Hub is left to
    the Hub's own checks."""
    if "://" not in section.path and not Path(section.path).is_dir():
        return
    storage = open_storage(section.path)
    found = {o.key: o for o in storage.list() if "/" not in o.key}
    needed = sorted(needed_files(storage, section.path, found))
    missing = [name for name in needed if name not in found]
    if missing:
        raise InputError(
            f"model.path {section.path!r}: {len(missing)} of the {len(needed)} weight files that {INDEX} names are not "
            f"there ({', '.join(missing[:3])}); copy the model again"
        )
    with ThreadPoolExecutor(_PARALLEL_READS) as pool:
        list(pool.map(lambda name: _check_file(storage, found[name]), needed))


def needed_files(storage: Storage, path: str, found: Iterable[str]) -> set[str]:
    """Names of the weight files that the model consists of, of the files ``found``; InputError when there are none."""
    names = set(found)
    if SINGLE in names:
        return {SINGLE}
    if INDEX in names:
        try:
            index = read_record(_Index, parse_json(storage.read(INDEX), finite=False, unique=False))
            if not index["weight_map"]:
                raise Malformed("it is empty")
        except Malformed as error:
            raise InputError(f"{storage.uri(INDEX)} holds no weight_map ({error}); copy the model again") from error
        return set(index["weight_map"].values())
    others = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth", ".h5", ".gguf")))
    hint = (
        f"{', '.join(others[:3])} would have to be saved as safetensors, with save_pretrained of transformers"
        if others
        else f"put {SINGLE} there"
    )
    raise InputError(f"model.path {path!r} holds no weights in safetensors: {hint}")


class _Index(TypedDict):
    weight_map: dict[str, str]


class Extent(NamedTuple):
    """Bytes of a tensor behind its file's header."""

    start: Count
    stop: Count


class Entry(TypedDict):
    """What a header says of a tensor."""

    dtype: str
    shape: list[Count]
    data_offsets: Extent


def read_header(raw: bytes) -> dict[str, Entry]:
    """Each tensor's entry in a safetensors header; raises Malformed."""
    found = parse_json(raw, finite=False)
    entries = {n: e for n, e in found.items() if n != "__metadata__"} if isinstance(found, dict) else found
    return read_record(dict[str, Entry], entries)


def _check_file(storage: Storage, item: ObjectInfo) -> None:
    size = _whole_size(storage, item)
    if size != item.size:
        raise InputError(
            f"{storage.uri(item.key)} is torn: it has {item.size} bytes"
            + (f", and its header speaks of {size}" if size else " and no readable header")
            + "; copy the model again"
        )


def _whole_size(storage: Storage, item: ObjectInfo) -> int | None:
    """Bytes of the whole file by its header; None without a readable one."""
    if item.size < 8:
        return None
    (length,) = struct.unpack("<Q", storage.read_range(item.key, 0, 8))
    if length > min(item.size - 8, LARGEST_HEADER):
        return None
    try:
        header = read_header(storage.read_range(item.key, 8, 8 + length))
    except Malformed:
        return None
    return 8 + int(length) + max((entry["data_offsets"].stop for entry in header.values()), default=0)
