"""Outputs of a frozen model for the samples of prepared data: computed once, before a run's first step, and then read
with the samples. They are the reference's log-likelihoods of a preference, or the likeliest tokens of a teacher.

They are stored next to the prepared data, in a folder of their own: one object per block, or several where the outputs
are larger than the samples. The manifest, written last, marks them as complete and has the hash of every object, so
that any number of runs may compute the same ones, and may die at any point.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Required, TypedDict

import numpy as np
import numpy.typing as npt

from trainer.errors import CorruptObject
from trainer.parsing import Malformed
from trainer.records import read_record
from trainer.storage import Storage, to_json

Outputs = Mapping[str, npt.NDArray[Any]]
"""The outputs for one sample, by name."""

MANIFEST = "outputs.json"
ENDS = ".ends"
FOLDER = "outputs-"
PART_BYTES = 4 << 20
"""The size of a part for outputs that are larger than the samples: a micro-batch reads a part for each sample."""

Ints = npt.NDArray[np.int64]


class Part(NamedTuple):
    """Samples of a block that follow each other, whose outputs are one object."""

    window: int
    block: int
    number: int = 0


@dataclass(frozen=True)
class PartOutputs:
    """The outputs for the samples of a part: for each name, those of all samples joined along the first axis, and where
    each sample's end."""

    joined: Mapping[str, npt.NDArray[Any]]
    ends: Mapping[str, npt.NDArray[np.int64]]

    def of(self, row: int) -> dict[str, npt.NDArray[Any]]:
        """Returns the outputs for the sample in this row of the part."""
        starts = {name: ends[row - 1] if row else 0 for name, ends in self.ends.items()}
        return {name: values[starts[name] : self.ends[name][row]] for name, values in self.joined.items()}

    @property
    def nbytes(self) -> int:
        return sum(values.nbytes for part in (self.joined, self.ends) for values in part.values())


def encode_outputs(samples: Sequence[Outputs]) -> bytes:
    from safetensors.numpy import save

    arrays: dict[str, npt.NDArray[Any]] = {}
    for name in samples[0]:
        arrays[name] = np.concatenate([sample[name] for sample in samples])
        arrays[name + ENDS] = np.cumsum([len(sample[name]) for sample in samples])
    return bytes(save(arrays))


def decode_outputs(raw: bytes) -> PartOutputs:
    from safetensors.numpy import load

    arrays = load(raw)
    ends = {name.removesuffix(ENDS): values for name, values in arrays.items() if name.endswith(ENDS)}
    return PartOutputs({name: arrays[name] for name in ends}, ends)


class _OutputsManifest(TypedDict, total=False):
    settings: Required[Any]
    blocks: Required[dict[str, str]]
    part_targets: int | None


@dataclass(frozen=True)
class StoredOutputs:
    """Complete outputs in ``folder``. ``blocks``: the sha256 of each object, by its key. ``settings``: everything that
    decides the outputs. ``part_targets``: see `part_numbers`."""

    folder: Storage
    blocks: Mapping[str, str]
    settings: Any = None
    part_targets: int | None = None

    def sha256(self, part: Part) -> str:
        return self.blocks[part_key(part)]

    def bytes_of(self, part: Part) -> bytes:
        """Reads the outputs of a part. Raises CorruptObject for other bytes than those that were written."""
        key = part_key(part)
        for _ in range(2):  # the second read is for bytes that were damaged on the way
            raw = self.folder.read(key)
            if hashlib.sha256(raw).hexdigest() == self.blocks[key]:
                return raw
        raise CorruptObject(
            f"{self.folder.uri(key)}: its bytes are not those that were written; delete the folder {self.folder.url}, "
            "and start the run again to compute them again"
        )


def part_numbers(targets: npt.NDArray[np.integer[Any]], part_targets: int | None) -> Ints:
    """Returns the part that each sample of a block is in. ``targets``: the number of targets of each. ``part_targets``:
    about so many targets are in a part; None if a block is one part."""
    return (np.cumsum(targets, dtype=np.int64) - targets) // (part_targets or np.iinfo(np.int64).max)


def part_key(part: Part) -> str:
    suffix = f"-{part.number:05d}" if part.number else ""
    return f"w{part.window:06d}-{part.block:04d}{suffix}.safetensors"


def folder_of(prepared: Storage, settings: Mapping[str, Any]) -> Storage:
    """Returns the folder of the outputs that ``settings``, everything that decides them, lead to."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return prepared.child(f"{FOLDER}{digest[:24]}")


def open_outputs(folder: Storage) -> StoredOutputs | None:
    """Returns None if the outputs are missing or not complete."""
    try:
        found = read_record(_OutputsManifest, folder.read_json(MANIFEST))
    except FileNotFoundError:
        return None
    except Malformed as error:
        raise CorruptObject(f"{folder.uri(MANIFEST)} cannot be understood ({error}); delete {folder.url}") from error
    return StoredOutputs(folder, found["blocks"], found["settings"], found.get("part_targets"))


def all_outputs(prepared: Storage) -> list[StoredOutputs]:
    """Returns all complete outputs that are stored next to the prepared data."""
    folders = [prepared.child(name) for name in prepared.folders() if name.startswith(FOLDER)]
    return [found for found in map(open_outputs, folders) if found is not None]


def missing_parts(folder: Storage, parts: Iterable[Part]) -> list[Part]:
    """Returns those of the ``parts`` that are not stored yet."""
    there = {info.key for info in folder.list()}
    return [part for part in parts if part_key(part) not in there]


def complete(
    folder: Storage, settings: Mapping[str, Any], parts: Iterable[Part], part_targets: int | None = None
) -> None:
    """Writes the manifest. Every part is stored."""
    hashes = {key: hashlib.sha256(folder.read(key)).hexdigest() for key in map(part_key, parts)}
    manifest = {"settings": dict(settings), "blocks": hashes, "part_targets": part_targets}
    folder.put_if_absent(MANIFEST, to_json(manifest))
