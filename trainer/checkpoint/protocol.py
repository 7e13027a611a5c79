"""The commit protocol: a reader sees whole checkpoints or none, and an acknowledged one is never lost.

Writers can die at any point, be cut off and come back (zombies), and lose the reply of a request that took effect.
What holds then rests on one property of the store: an object can be created only once (`Storage.put_if_absent`).

    0. Whoever takes the run claims driver number d, and each start of workers claims attempt g (claims.py); only
       *then* does it list and verify older commits. The order matters: a commit that an older attempt acknowledges
       was in the listing, because acknowledging it (step 4) found no newer claim.
    1. The files go under a name that was never used before, and are listed there with their sizes (blobs.py).
    2. Their names, bytes and sha256 are collected into the record.
    3. The record ``commits/<g>/<inverted step>.json`` is put if absent. This is the only commit point. A put that
       finds an object there compares nonces: its own record, whose first reply was lost, or somebody else's.
    4. A newer claim is looked for. If there is one, this attempt is a zombie: it ends without acknowledging, although
       the record may exist. Nobody is hurt by it, nor by a record whose files a newer attempt has swept before it was
       put: newer generations are read first, and only who has committed sweeps. Then the record is looked for in a
       listing, which is where a reader will look: a store that does not list it has not got it.
    5. Retention (retention.py) deletes the record first and its files after, so that no acknowledged record ever points
       at nothing; files and unfinished uploads that no record names are swept when their attempt is older than the
       one that sweeps.

tests/unit/trainer/checkpoint/protocol_model.py runs this code through all interleavings, and shows that none of the
steps can go.

A reader (restore.py) goes through the records from the newest generation's newest to the oldest, and takes the first
one whose every file has the size and sha256 of the record, before anything of it is used.
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
    if (record.attempt, record.step) not in commit_keys(storage):
        check_fence(storage, record.driver, record.attempt)  # a newer attempt may have deleted it
        storage.list(layout.COMMITS, containing=[record.key])


def list_commits(storage: Storage, on_skip: OnSkip = log_skip, *, newest: int | None = None) -> list[CommitRecord]:
    """Newest generation first, newest step first within it; one listing and the records, no files.

    ``newest`` reads only so many. Unreadable records are told to ``on_skip``; one that retention deletes meanwhile is
    left out.
    """
    keys = commit_keys(storage)[:newest]
    found = in_parallel(lambda key: read_commit(storage, key, on_skip), keys, _PARALLEL_READS)
    return [record for record in found if record is not None]


def commit_keys(storage: Storage) -> list[CommitKey]:
    """Of every record, in the order of `list_commits`; one listing."""
    parsed = (layout.parse_commit(info.key) for info in storage.list(layout.COMMITS))
    return sorted((key for key in parsed if key is not None), reverse=True)


def read_commit(storage: Storage, key: CommitKey, on_skip: OnSkip = log_skip) -> CommitRecord | None:
    """Returns None when it has been deleted, or when it is unreadable, which ``on_skip`` is called with.

    StorageError when the storage says of a record that it is not there, and goes on listing it."""
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
        f"the storage lists {uri} and says that it is not there: nothing is decided by that. Check its health, then "
        "run the same command again"
    )
