"""Step 5 of the protocol: which checkpoints stay, and what is swept away (protocol.py says why in this order)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

from trainer import layout
from trainer.checkpoint.blobs import attempt_of
from trainer.checkpoint.protocol import CommitKey, commit_keys, read_commit
from trainer.checkpoint.record import CommitRecord
from trainer.errors import MusterError
from trainer.storage import Storage

log = logging.getLogger(__name__)
_PARALLEL_READS = 8


def kept(records: Iterable[CommitRecord], keep_last: int, keep_for_s: float | None, now: float) -> set[CommitKey]:
    """The ``keep_last`` newest records, and those committed in the last ``keep_for_s``; ``now`` is unix s.

    A record goes when neither wants it. The newest one always stays: it is what training goes on from.
    """
    ordered = sorted(records, key=_key, reverse=True)
    keep = {_key(record) for record in ordered[:keep_last]}
    if keep_for_s is not None:
        keep |= {_key(record) for record in ordered if now - _committed_s(record) <= keep_for_s}
    return keep


class Retention:
    """Of one attempt, called after each of its acknowledged commits. Records are read once each, so the cost of a call
    does not grow with the number that stay."""

    def __init__(
        self,
        storage: Storage,
        attempt: int,
        *,
        keep_last: int,
        keep_for_s: float | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last is {keep_last}; at least the newest commit has to stay")
        self._storage, self._attempt, self._clock = storage, attempt, clock
        self._keep_last, self._keep_for_s = keep_last, keep_for_s
        self._known: dict[CommitKey, CommitRecord] = {}
        self._uploads_swept = False

    def apply(self) -> list[int]:
        """Returns the steps whose records were deleted. What is interrupted here is swept by the next attempt."""
        keys = commit_keys(self._storage)
        self._read(keys)
        records = {key: self._known[key] for key in keys if key in self._known}
        keep = kept(records.values(), self._keep_last, self._keep_for_s, self._clock())
        oldest = min(keep, default=None)
        surplus = [key for key in keys if key not in keep and (key in records or (oldest is not None and key < oldest))]
        self._storage.delete(layout.commit(*key) for key in surplus)
        named = {records[key].checkpoint for key in keep}
        sweep(
            self._storage, self._attempt, {records[key].checkpoint for key in surplus if key in records} - named, named
        )
        self._sweep_uploads()
        return sorted(step for _, step in surplus)

    def _read(self, keys: list[CommitKey]) -> None:
        self._known = {key: record for key, record in self._known.items() if key in set(keys)}
        unread = [key for key in keys if key not in self._known]
        with ThreadPoolExecutor(_PARALLEL_READS) as pool:
            found = pool.map(lambda key: read_commit(self._storage, key, lambda *_: None), unread)
            self._known.update({_key(record): record for record in found if record is not None})

    def _sweep_uploads(self) -> None:
        """Once per attempt. A store may forbid listing them, which is no reason to stop training."""
        if self._uploads_swept:
            return
        self._uploads_swept = True
        try:
            self._storage.abort_uploads(layout.CHECKPOINTS, lambda key: is_older(key.split("/")[0], self._attempt))
        except MusterError as error:
            log.warning("uploads that dead attempts of %s left behind are not cleared: %s", self._storage.url, error)


def retain(storage: Storage, keep_last: int, attempt: int, *, keep_for_s: float | None = None) -> list[int]:
    """One call of `Retention`."""
    return Retention(storage, attempt, keep_last=keep_last, keep_for_s=keep_for_s).apply()


def sweep(storage: Storage, attempt: int, dropped: Iterable[str], named: Collection[str]) -> None:
    """Deletes the files of dropped records, and those of older attempts that no record names."""
    gone = set(dropped)
    gone |= {name for name in storage.folders(layout.CHECKPOINTS) if name not in named and is_older(name, attempt)}
    storage.delete(info.key for name in sorted(gone) for info in storage.list(layout.checkpoint(name)))


def is_older(name: str, attempt: int) -> bool:
    """Whether a checkpoint's name was made by an attempt before ``attempt``; False for names of other making."""
    maker = attempt_of(name)
    return maker is not None and maker < attempt


def _key(record: CommitRecord) -> CommitKey:
    return record.attempt, record.step


def _committed_s(record: CommitRecord) -> float:
    """Unix s; a record whose time cannot be read counts as new."""
    try:
        return datetime.fromisoformat(record.committed_at).timestamp()
    except ValueError:
        return float("inf")
