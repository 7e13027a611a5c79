"""Step 5 of the protocol: which checkpoints stay, and what is deleted (protocol.py gives the reason for the order)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable
from datetime import datetime

from trainer.checkpoint.blobs import commit_of
from trainer.checkpoint.protocol import CommitKey, commit_keys, read_commit
from trainer.checkpoint.record import CommitRecord
from trainer.errors import MusterError
from trainer.run import layout
from trainer.storage import Storage, in_parallel

log = logging.getLogger(__name__)
_PARALLEL_READS = 8


def kept(records: Iterable[CommitRecord], keep_last: int, keep_for_s: float | None, now: float) -> set[CommitKey]:
    """Returns the keys of the ``keep_last`` newest records and of those committed in the last ``keep_for_s``; ``now``
    is unix s. The newest one always stays, because training resumes from it."""
    ordered = sorted(records, key=_key, reverse=True)
    keep = {_key(record) for record in ordered[:keep_last]}
    if keep_for_s is not None:
        keep |= {_key(record) for record in ordered if now - _committed_s(record) <= keep_for_s}
    return keep


class Retention:
    """Deletes old checkpoints for one attempt, after each of its acknowledged commits. Each record is read once, so the
    cost of a call does not grow with the number that stay.

    Objects that a listing lacks decide what is deleted, so an incomplete listing deletes nothing."""

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

    def apply(self, newest: CommitRecord) -> list[int]:
        """Returns the steps whose records were deleted; ``newest`` is the commit just acknowledged. The next attempt
        sweeps what an interrupted call leaves."""
        self._known[_key(newest)] = newest
        keys = commit_keys(self._storage)
        if hidden := self._hidden(_key(newest), keys):
            log.warning("nothing is deleted: the listing of %s lacks %s", self._storage.url, layout.commit(*hidden))
            return []
        self._known = {key: record for key, record in self._known.items() if key in set(keys)}
        unread = [key for key in keys if key not in self._known]
        found = in_parallel(lambda key: read_commit(self._storage, key, lambda *_: None), unread, _PARALLEL_READS)
        self._known.update({_key(record): record for record in found if record is not None})
        records = {key: self._known[key] for key in keys if key in self._known}
        recent = kept(records.values(), self._keep_last, self._keep_for_s, self._clock())
        # The best one stays as long as a record that names it: a resume from that record may end with it.
        keep = recent | {best for key in recent if (best := records[key].best_key) is not None}
        # An unreadable record is deleted only once ``keep_last`` newer ones exist: this one read may have failed by
        # chance.
        unread_below = min(recent) if len(recent) >= self._keep_last else None
        surplus = [key for key in keys if key not in keep and (key in records or (unread_below and key < unread_below))]
        self._storage.delete(layout.commit(*key) for key in surplus)
        for key in surplus:
            self._known.pop(key, None)
        named = {records[key].checkpoint for key in keep & records.keys()}
        dropped = {records[key].checkpoint for key in surplus if key in records} - named
        # While an unreadable record stays, the files that it names are unknown: then nothing counts as an orphan.
        orphans = self._orphans(named, keys) if records.keys() >= set(keys) - set(surplus) else set()
        for name in sorted(dropped | orphans):
            self._storage.delete(info.key for info in self._storage.list(layout.checkpoint(name)))
        self._sweep_uploads()
        return sorted(step for _, step in surplus)

    def _hidden(self, newest: CommitKey, keys: list[CommitKey]) -> CommitKey | None:
        """Returns a commit that exists and that the listing lacks, or None. A commit that was read before may have been
        deleted (by a newer attempt, or by hand), so the record itself is looked up."""
        absent = self._known.keys() - set(keys)
        if newest in absent:
            return newest
        return next((key for key in sorted(absent) if self._storage.info(layout.commit(*key)) is not None), None)

    def _orphans(self, named: Collection[str], listed: Collection[CommitKey]) -> set[str]:
        """Returns the checkpoints of older attempts that no record names. Returns none when one of them does have a
        record, by its attempt and step, that the listing lacks."""
        names = self._storage.folders(layout.CHECKPOINTS)
        orphans = {name for name in names if name not in named and is_older(name, self._attempt)}
        for key in sorted({key for name in orphans if (key := commit_of(name)) and key not in listed}):
            if self._storage.info(layout.commit(*key)) is not None:
                log.warning("no files are swept: the listing of %s lacks %s", self._storage.url, layout.commit(*key))
                return set()
        return orphans

    def _sweep_uploads(self) -> None:
        """Clears unfinished uploads of older attempts, once per attempt."""
        if self._uploads_swept:
            return
        self._uploads_swept = True
        try:
            self._storage.abort_uploads(layout.CHECKPOINTS, lambda key: is_older(key.split("/")[0], self._attempt))
        except MusterError as error:  # a store may forbid listing uploads, which is no reason to stop training
            log.warning("uploads that dead attempts of %s left behind are not cleared: %s", self._storage.url, error)


def is_older(name: str, attempt: int) -> bool:
    """Returns whether an attempt before ``attempt`` made this checkpoint's name; False for any other kind of name."""
    made = commit_of(name)
    return made is not None and made[0] < attempt


def _key(record: CommitRecord) -> CommitKey:
    return record.attempt, record.step


def _committed_s(record: CommitRecord) -> float:
    """Returns unix s; a record whose time cannot be read counts as new."""
    try:
        return datetime.fromisoformat(record.committed_at).timestamp()
    except ValueError:
        return float("inf")
