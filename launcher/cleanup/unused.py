"""Finds and deletes prepared data and copies of models that no run uses. `trainer.run.shared` has the protocol that
keeps a run which begins meanwhile safe."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from trainer.data.run_data import read_data
from trainer.errors import CorruptObject, InputError, MusterError, StorageError
from trainer.run import layout
from trainer.run.frozen import read_recipe
from trainer.run.shared import BUSY_S, CONDEMNED, YOUNG_S, delete_unless_used
from trainer.storage import Storage, in_parallel

_PARALLEL = 16


@dataclass(frozen=True)
class SharedFolder:
    """A folder that runs share, e.g. ``_data/<fingerprint>``. ``age_s``: since its newest object was written;
    ``condemned_s``: since gc began to delete it, if that has not ended."""

    key: str
    bytes: int
    age_s: float
    condemned_s: float | None


@dataclass
class Unused:
    """What `muster gc` may delete, and how many folders it keeps, by the reason."""

    folders: list[SharedFolder] = field(default_factory=list)
    named: int = 0
    young: int = 0
    notes: list[str] = field(default_factory=list)


def find_unused(storage: Storage) -> Unused:
    """Looks at the shared folders of a storage and at all its runs. Raises when one of them cannot be read: then it is
    not known what is in use."""
    found = Unused()
    keys = [f"{kind}/{name}" for kind in (layout.PREPARED, layout.MODELS) for name in storage.folders(kind)]
    named = set(_named(storage, keys, found.notes))
    now = time.time()
    for folder in in_parallel(lambda key: _shared(storage, key, now), keys, _PARALLEL):
        if folder.condemned_s is not None and folder.condemned_s >= BUSY_S:
            found.folders.append(folder)  # used or not: the deletion is completed, or withdrawn
        elif folder.key in named:
            found.named += 1
        elif folder.age_s < YOUNG_S or folder.condemned_s is not None:
            found.young += 1
        else:
            found.folders.append(folder)
    return found


def delete_unused(storage: Storage, folder: SharedFolder) -> bool:
    """Returns False if the folder has come into use since it was found, and stays."""
    if not delete_unless_used(storage.child(folder.key), lambda: folder.key in set(_named(storage, [folder.key], []))):
        return False
    storage.remove_empty_folders(folder.key)
    return True


def _shared(storage: Storage, key: str, now: float) -> SharedFolder:
    objects = storage.list(key)
    condemned = next((now - info.modified for info in objects if info.key == f"{key}/{CONDEMNED}"), None)
    written = [info.modified for info in objects if info.key != f"{key}/{CONDEMNED}"]
    return SharedFolder(key, sum(info.size for info in objects), now - max(written, default=0.0), condemned)


def _named(storage: Storage, keys: list[str], notes: list[str]) -> Iterator[str]:
    """Yields which of the ``keys`` the records of runs name. Of models, all if one run's copy is not known."""
    folders = storage.folders()
    if hidden := {key.partition("/")[0] for key in keys}.difference(folders):
        raise StorageError(f"the listing of {storage.url} lacks {min(hidden)}, so it may lack runs: nothing is deleted")
    runs = [storage.child(name) for name in folders if not name.startswith(("_", "."))]
    for fingerprints in in_parallel(_fingerprints, runs, _PARALLEL):
        yield from (f"{layout.PREPARED}/{fingerprint}" for fingerprint in fingerprints)
    models = [key for key in keys if key.startswith(f"{layout.MODELS}/")]
    if not models:
        return
    bases = [read_recipe(run).model for run in runs if run.info(layout.RECIPE) is not None]
    sections = {section.model_dump_json(): section for section in bases if section.quantization == "nf4"}
    for section in sections.values():
        from trainer.model.prequantised import copy_name

        try:
            yield f"{layout.MODELS}/{copy_name(section)}"
        except MusterError as error:
            notes.append(f"models are kept: which copy of {section.path} runs use is not known ({error})")
            yield from models


def _fingerprints(run: Storage) -> list[str]:
    try:
        return [spec.fingerprint for spec in read_data(run).values()]
    except FileNotFoundError:
        return []
    except CorruptObject as error:
        raise InputError(f"nothing is deleted: it is not known which data {run.url} uses ({error})") from error
