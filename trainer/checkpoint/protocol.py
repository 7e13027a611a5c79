"""The commit protocol: a reader sees complete checkpoints or none, and an acknowledged one is never lost.

Writers can die at any point, be cut off and come back (zombies), and lose the reply of a request that took effect.
The protocol relies on one property of the store: an object can be created only once (`Storage.put_if_absent`).

    0. A driver that takes the run claims driver number d, and each start of workers claims attempt g (claims.py); only
       *then* does it list and verify older commits. The order matters: a commit that an older attempt acknowledges
       was in the listing, because acknowledging it (step 4) found no newer claim.
    1. The files go under a name that was never used before, and are listed there with their sizes (blobs.py).
    2. Their names, bytes and sha256 are collected into the record.
    3. The record ``commits/<g>/<inverted step>.json`` is put if absent. This is the only commit point. A put that
       finds an object there compares nonces: its own record, whose first reply was lost, or another writer's.
    4. A newer claim is looked for. If there is one, this attempt is a zombie: it ends without acknowledging, although
       the record may exist. That record does no harm, nor does a record whose files a newer attempt swept before the
       record was put: newer generations are read first, and only an attempt that has committed sweeps. Then the record
       is looked for in a listing, because readers will look there: a record that the store does not list is not stored.
    5. Retention (retention.py) deletes the record first and its files after, so that no acknowledged record ever names
       files that are gone. Files and unfinished uploads that no record names are swept when their attempt is older than
       the one that sweeps.

tests/unit/trainer/checkpoint/protocol_model.py runs this code through all interleavings, and shows that each of the
steps is needed.

A reader (restore.py) tries the records from the newest generation's newest to the oldest. It takes the first one whose
every file has the size and sha256 of the record, and checks that before it uses any of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from trainer.checkpoint.record import CommitRecord
from trainer.errors import CorruptObject, Fenced, StorageError
from trainer.run import layout
from trainer.run.claims import check_fence
from trainer.storage import Storage, in_parallel

log = logging.getLogger(__name__)
_PARALLEL_READS = 8

CommitKey = tuple[int, int]
"""(attempt, step) of a record."""

OnSkip = Callable[[int, str, str], None]
"""Called with (step, uri, reason) for every commit that is skipped."""


def log_skip(step: int, uri: str, reason: str) -> None:
    log.warning("the checkpoint of step %d at %s is skipped: %s", step, uri, reason)


def commit(storage: Storage, record: CommitRecord) -> None:
    """Does steps 3 and 4, after all of the record's files were uploaded. Returning is the acknowledgement.

    Raises Fenced when a newer claim exists, or when another writer has used this attempt's number. After a StorageError
    the record may or may not be there, and the attempt has to end: a reader may take it, since it is complete.
    """
    if not storage.put_if_absent(record.key, record.to_json()):
        raise Fenced(
            f"{storage.uri(record.key)} holds another process's commit of step {record.step}: that process "
            f"also writes as attempt {record.attempt}; stop this one and run the command again"
        )
    check_fence(storage, record.driver, record.attempt)
    if (record.attempt, record.step) not in commit_keys(storage):
        check_fence(storage, record.driver, record.attempt)  # a newer attempt may have deleted it
        storage.list(layout.COMMITS, containing=[record.key])


def list_commits(storage: Storage, on_skip: OnSkip = log_skip, *, newest: int | None = None) -> list[CommitRecord]:
    """Returns the records, newest generation first, newest step first within it. Costs one listing and one read per
    record; reads no files.

    ``newest`` bounds the number of records that are read. ``on_skip`` is called for each unreadable one. A record that
    retention deletes at the same time is left out.
    """
    keys = commit_keys(storage)[:newest]
    found = in_parallel(lambda key: read_commit(storage, key, on_skip), keys, _PARALLEL_READS)
    return [record for record in found if record is not None]


def commit_keys(storage: Storage) -> list[CommitKey]:
    """Returns the key of every record, in the order of `list_commits`; costs one listing."""
    parsed = (layout.parse_commit(info.key) for info in storage.list(layout.COMMITS))
    return sorted((key for key in parsed if key is not None), reverse=True)


def read_commit(storage: Storage, key: CommitKey, on_skip: OnSkip = log_skip) -> CommitRecord | None:
    """Returns None when the record has been deleted, or is unreadable; ``on_skip`` is called for an unreadable one.

    Raises StorageError when the storage lists the record and answers that it does not exist."""
    name = layout.commit(*key)
    try:
        record = CommitRecord.from_json(storage.read(name), storage.uri(name))
        if (record.attempt, record.step) != key:
            raise CorruptObject(f"the record is that of attempt {record.attempt}, step {record.step}")
        return record
    except FileNotFoundError as error:
        if key in commit_keys(storage):
            raise contradiction(storage.uri(name)) from error
        return None
    except CorruptObject as error:
        on_skip(key[1], storage.uri(name), str(error))
        return None


def contradiction(uri: str) -> StorageError:
    return StorageError(
        f"the storage lists {uri} and also reports that it does not exist. The two answers contradict each other, so "
        "muster stops. Check the storage's health, then run the same command again"
    )
