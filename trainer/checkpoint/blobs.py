"""The objects of a checkpoint. They are uploaded under a name that was never used before, so nothing is overwritten."""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Collection, Mapping
from pathlib import Path

from trainer.checkpoint.record import FileEntry
from trainer.errors import CorruptObject, StorageError
from trainer.run import layout
from trainer.storage import Storage, in_parallel, open_storage

_PARALLEL_UPLOADS = 4
_BLOCK = 2**20


def put_checkpoint(
    storage: Storage, content: Path | Mapping[str, bytes], *, attempt: int, step: int, needed: Collection[str] = ()
) -> tuple[str, dict[str, FileEntry]]:
    """Uploads a folder (all files below it) or named bytes to ``checkpoints/<name>/``; returns the name and the files'
    entries for the commit record. Readers do not see the checkpoint before its record exists.

    Raises CorruptObject, with nothing uploaded, when one of the ``needed`` files is missing: a folder whose files are
    being deleted looks like one that never had them. Raises StorageError when the storage does not list the files, and
    CorruptObject when it lists one with another size."""
    name = new_name(attempt, step)
    if isinstance(content, Mapping):
        names = sorted(content)
    else:
        names = [info.key for info in open_storage(str(content)).list()]
    check_needed(f"the checkpoint of step {step}", names, needed)

    def put(file: str) -> FileEntry:
        key = f"{layout.checkpoint(name)}/{file}"
        if isinstance(content, Mapping):
            storage.write(key, content[file])
            return entry_of(content[file])
        entry = entry_of_file(content / file)
        storage.upload(key, content / file)
        return entry

    files = dict(zip(names, in_parallel(put, names, _PARALLEL_UPLOADS), strict=True))
    _check_listed(storage, layout.checkpoint(name), files)
    return name, files


def _check_listed(storage: Storage, folder: str, files: Mapping[str, FileEntry]) -> None:
    written = {f"{folder}/{file}": entry["bytes"] for file, entry in files.items()}
    found = {info.key: info.size for info in storage.list(folder)}
    for key, size in written.items():
        if key not in found:
            raise StorageError(f"{storage.uri(key)} was uploaded, and the storage does not list it; check its health")
        if found[key] != size:
            raise CorruptObject(f"{storage.uri(key)} has {found[key]} bytes, {size} were written")


def check_needed(what: str, names: Collection[str], needed: Collection[str]) -> None:
    """Raises CorruptObject when one of the ``needed`` files is missing."""
    missing = sorted(set(needed) - set(names))
    if missing:
        raise CorruptObject(f"{what} has no {', '.join(missing)}: training could not resume from it")


def new_name(attempt: int, step: int) -> str:
    """Returns a name that is unique by its random part; attempt and step are for people and the sweep of orphans."""
    return f"a{attempt:06d}-s{step:09d}-{uuid.uuid4().hex[:12]}"


def commit_of(name: str) -> tuple[int, int] | None:
    """Returns the attempt and the step in a checkpoint's name; None for a name that `new_name` did not make."""
    match = re.fullmatch(r"a(\d{6,})-s(\d{9,})-[0-9a-f]{12}", name)
    return (int(match[1]), int(match[2])) if match else None


def entry_of(data: bytes) -> FileEntry:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def entry_of_file(path: Path) -> FileEntry:
    """Returns the entry of a file, which is read in blocks."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}
