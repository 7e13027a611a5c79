"""The commit protocol: a reader sees whole checkpoints or none, and an acknowledged one is never lost.

Writers can die at any point, be cut off and come back (zombies), and lose the reply of a request that took effect.
What holds then rests on one property of the store: an object can be created only once (`Storage.put_if_absent`).

    0. Whoever takes the run claims driver number d, and each start of workers claims attempt g (claims.py); only
       *then* does it list and verify older commits. The order matters: a commit that an older attempt acknowledges
       was in the listing, because acknowledging it (step 4) found no newer claim.
    1. The files go under a name that was never used before (blobs.py).
    2. Their names, bytes and sha256 are collected into the record.
    3. The record ``commits/<g>/<inverted step>.json`` is put if absent. This is the only commit point. A put that
       finds an object there compares nonces: its own record, whose first reply was lost, or somebody else's.
    4. A newer claim is looked for. If there is one, this attempt is a zombie: it ends without acknowledging, although
       the record may exist. Nobody is hurt by it, nor by a record whose files a newer attempt has swept before it was
       put: newer generations are read first, and only who has committed sweeps.
    5. Retention deletes the record first and its files after, so that no acknowledged record ever points at nothing;
       files that no record names are swept when their attempt is older than the one that sweeps.

tests/unit/protocol_model.py runs this code through all interleavings, and shows that none of the steps can go.

A reader (restore.py) goes through the records from the newest generation's newest to the oldest, and takes the first
one whose every file has the size and sha256 of the record, before anything of it is used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from trainer import layout
from trainer.checkpoint.blobs import attempt_of
from trainer.checkpoint.claims import check_fence
from trainer.checkpoint.record import CommitRecord
from trainer.errors import CorruptObject, Fenced
from trainer.storage import Storage

log = logging.getLogger(__name__)
_PARALLEL_READS = 8

CommitKey = tuple[int, int]
"""(attempt, step) of a record."""

OnSkip = Callable[[int, str, str], None]
"""Told (step, uri, reason) of every commit that is passed over."""


def log_skip(step: int, uri: str, reason: str) -> None:
    log.warning("the checkpoint of step %d at %s is passed over: %s", step, uri, reason)


def commit(storage: Storage, record: CommitRecord) -> None:
    """Steps 3 and 4; the record's files are all uploaded. Returning is the acknowledgement.

    Fenced when a newer claim exists, or when another writer has used this attempt's number. After a StorageError the
    record may or may not be there, and the attempt has to end: a reader may take it, since it is whole.
    """
    if not storage.put_if_absent(record.key, record.to_json()):
        raise Fenced(
            f"{storage.uri(record.key)} holds somebody else's commit of step {record.step}: another process "
            f"writes as attempt {record.attempt}; stop this one and run the command once more"
        )
    check_fence(storage, record.driver, record.attempt)


def list_commits(storage: Storage, on_skip: OnSkip = log_skip, *, newest: int | None = None) -> list[CommitRecord]:
    """Newest generation first, newest step first within it; one listing and the records, no files.

    ``newest`` reads only so many. Unreadable records are told to ``on_skip``; one that retention deletes meanwhile is
    left out.
    """
    with ThreadPoolExecutor(_PARALLEL_READS) as pool:
        found = pool.map(lambda key: read_commit(storage, key, on_skip), commit_keys(storage)[:newest])
        return [record for record in found if record is not None]


def commit_keys(storage: Storage) -> list[CommitKey]:
    """Of every record, in the order of `list_commits`; one listing."""
    parsed = (layout.parse_commit(info.key) for info in storage.list(layout.COMMITS))
    return sorted((key for key in parsed if key is not None), reverse=True)


def read_commit(storage: Storage, key: CommitKey, on_skip: OnSkip = log_skip) -> CommitRecord | None:
    """None when it has been deleted, or when it is unreadable, which ``on_skip`` is told."""
    name = layout.commit(*key)
    try:
        record = CommitRecord.from_json(storage.read(name), storage.uri(name))
        if (record.attempt, record.step) != key:
            raise CorruptObject(f"the record is that of attempt {record.attempt}, step {record.step}")
        return record
    except FileNotFoundError:
        return None
    except CorruptObject as error:
        on_skip(key[1], storage.uri(name), str(error))
        return None


def retain(storage: Storage, keep_last: int, attempt: int) -> list[int]:
    """Step 5, after an acknowledged commit of ``attempt``: keeps the ``keep_last`` newest records and what they name.

    Returns the steps whose records were deleted. What is interrupted here is swept by the next attempt.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last is {keep_last}; at least the newest commit has to stay")
    records = {(r.attempt, r.step): r for r in list_commits(storage, lambda *_: None)}
    oldest_kept = sorted(records, reverse=True)[:keep_last][-1:]
    surplus = [key for key in commit_keys(storage) if oldest_kept and key < oldest_kept[0]]
    storage.delete(layout.commit(*key) for key in surplus)
    kept = {r.checkpoint for key, r in records.items() if key not in surplus}
    dropped = {records[key].checkpoint for key in surplus if key in records}
    _sweep(storage, attempt, dropped - kept, kept)
    return sorted(step for _, step in surplus)


def _sweep(storage: Storage, attempt: int, dropped: Iterable[str], kept: Iterable[str]) -> None:
    """Deletes the files of dropped records, and those of older attempts that no record names."""
    gone = set(dropped)
    for name in set(storage.folders(layout.CHECKPOINTS)) - gone - set(kept):
        maker = attempt_of(name)
        if maker is not None and maker < attempt:
            gone.add(name)
    storage.delete(info.key for name in sorted(gone) for info in storage.list(layout.checkpoint(name)))
