"""Checks that a model's weight files are complete, from their headers: no weights are read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TypedDict

from trainer.errors import InputError
from trainer.model.files.safetensors_header import header_of
from trainer.parsing import Malformed, parse_json
from trainer.recipe.sections.model import ModelSection
from trainer.records import read_record
from trainer.storage import Storage, in_parallel, open_storage

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_PARALLEL_READS = 8


def names_shown(names: Sequence[str]) -> str:
    """Returns the first three names, in one line."""
    return ", ".join(name if name.isprintable() else repr(name) for name in names[:3])


def check_weights(section: ModelSection) -> None:
    """Raises InputError when weight files of a folder or URL are missing or torn.

    A model on the Hub is not checked: the Hub's client does that."""
    if "://" not in section.path and not Path(section.path).is_dir():
        return
    storage = open_storage(section.path)
    found = {o.key: o for o in storage.list() if "/" not in o.key}
    needed = sorted(needed_files(storage, section.path, found))
    missing = [name for name in needed if name not in found]
    if missing:
        raise InputError(
            f"model.path {section.path!r}: {len(missing)} of the {len(needed)} weight files that {INDEX} names are not "
            f"there ({names_shown(missing)}); copy the model again"
        )

    def check(name: str) -> None:
        header_of(partial(storage.read_range, name), found[name].size, storage.uri(name))

    in_parallel(check, needed, _PARALLEL_READS)


def needed_files(storage: Storage, path: str, found: Iterable[str]) -> set[str]:
    """Returns the names of the model's weight files, given all its files ``found``; raises InputError if none."""
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


def wrong_shapes(path: str, count: int, name: str, stored: Iterable[int], expected: Iterable[int]) -> InputError:
    """Returns the error for ``count`` weights whose stored shape is not that of the model; ``name`` is one of them."""
    return InputError(
        f"model.path {path!r}: {count} weights do not have the shape that config.json gives ({name}: {list(stored)} "
        f"stored, {list(expected)} expected); put the config.json that belongs to the weights there"
    )
