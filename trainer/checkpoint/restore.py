"""Restoring: the newest complete commit, verified before any of its files is used."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TypeVar

from trainer.checkpoint.blobs import check_needed, entry_of, entry_of_file
from trainer.checkpoint.protocol import OnSkip, commit_keys, contradiction, log_skip, read_commit
from trainer.checkpoint.record import CommitRecord, FileEntry
from trainer.errors import CorruptObject
from trainer.run import layout
from trainer.storage import Storage, in_parallel

T = TypeVar("T")
_PARALLEL_FILES = 4


def newest_complete(storage: Storage, *, on_skip: OnSkip = log_skip) -> tuple[CommitRecord, dict[str, bytes]] | None:
    """Returns the newest complete commit and its files in memory; None when there is none."""
    return _first_complete(storage, lambda record: _in_memory(storage, record), on_skip)


def fetch_newest(
    storage: Storage,
    target: Path,
    *,
    needed: Collection[str] = (),
    check: Callable[[CommitRecord], None] = lambda record: None,
    on_skip: OnSkip = log_skip,
) -> CommitRecord | None:
    """Returns the newest complete commit, with its files in ``target``, a folder that this call creates (it must not
    exist). A commit without the ``needed`` files, or for which ``check`` raises CorruptObject, is not complete.

    Returns None, and creates no folder, when no commit is complete. Needs disk, not memory.
    """
    if target.exists():
        raise ValueError(f"{target} exists; a checkpoint is fetched into a folder of its own")

    def take(record: CommitRecord) -> None:
        check(record)
        check_needed(storage.uri(record.key), record.files, needed)
        _on_disk(storage, record, target)

    found = _first_complete(storage, take, on_skip)
    return found[0] if found else None


def fetch(storage: Storage, record: CommitRecord, target: Path) -> None:
    """Downloads one given commit into ``target``, a folder that must not exist. Each rank calls it once rank 0 has
    chosen the commit.

    Raises CorruptObject or FileNotFoundError, and leaves no folder, when the commit is not complete.
    """
    _on_disk(storage, record, target)


def _first_complete(
    storage: Storage, take: Callable[[CommitRecord], T], on_skip: OnSkip
) -> tuple[CommitRecord, T] | None:
    """Returns the newest record for which ``take`` succeeds, with its result; None when there is none."""
    # Lists again while there are commits that were not tried: a reader holds no claim, so retention may delete all that
    # it has listed, but only after a newer commit.
    tried: set[tuple[int, int]] = set()
    while keys := [key for key in commit_keys(storage) if key not in tried]:
        tried.update(keys)
        for record in filter(None, (read_commit(storage, key, on_skip) for key in keys)):
            try:
                return record, take(record)
            except (CorruptObject, FileNotFoundError) as error:
                if isinstance(error, FileNotFoundError):
                    _check_missing(storage, record)
                on_skip(record.step, storage.uri(layout.checkpoint(record.checkpoint)), str(error))
    return None


def _check_missing(storage: Storage, record: CommitRecord) -> None:
    """Raises StorageError when all files of the record are listed: then "not found" was a false answer."""
    folder = layout.checkpoint(record.checkpoint)
    if {record.file_key(name) for name in record.files} <= {info.key for info in storage.list(folder)}:
        raise contradiction(storage.uri(folder))


def _in_memory(storage: Storage, record: CommitRecord) -> dict[str, bytes]:
    files = {}
    for name, entry in record.files.items():
        key = record.file_key(name)
        files[name] = storage.read(key)
        _compare(storage.uri(key), entry_of(files[name]), entry)
    return files


def _on_disk(storage: Storage, record: CommitRecord, target: Path) -> None:
    partial = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}.partial")

    def bring(name: str) -> None:
        key = record.file_key(name)
        storage.download(key, partial / name)
        _compare(storage.uri(key), entry_of_file(partial / name), record.files[name])

    try:
        partial.mkdir(parents=True)
        in_parallel(bring, record.files, _PARALLEL_FILES)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _compare(uri: str, got: FileEntry, written: FileEntry) -> None:
    if got["bytes"] != written["bytes"]:
        raise CorruptObject(f"{uri} has {got['bytes']} bytes, {written['bytes']} were written")
    if got["sha256"] != written["sha256"]:
        raise CorruptObject(f"{uri} has sha256 {got['sha256'][:16]}…, {written['sha256'][:16]}… was written")
