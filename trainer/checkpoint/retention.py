"""Step 5 of the protocol: which checkpoints stay, and what is swept away (protocol.py says why in this order)."""

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
    """The ``keep_last`` newest records, and those committed in the last ``keep_for_s``; ``now`` is unix s.

    A record goes when neither wants it. The newest one always stays: it is what training goes on from.
    """
    ordered = sorted(records, key=_key, reverse=True)
    keep = {_key(record) for record in ordered[:keep_last]}
    if keep_for_s is not None:
        keep |= {_key(record) for record in ordered if now - _committed_s(record) <= keep_for_s}
    return keep


class Retention:
    """Deletes for one attempt, after each of its acknowledged commits. Records are read once each, so the cost of a
    call does not grow with the number that stay.

    What a listing lacks decides what is deleted, so nothing is deleted by a listing that is known to be incomplete."""

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
        """Returns the steps whose records were deleted; ``newest`` is the commit just acknowledged. What is interrupted
        here is swept by the next attempt."""
        self._known[_key(newest)] = newest
        keys = commit_keys(self._storage)
        if hidden := self._hidden(_key(newest), keys):
            log.warning("nothing is deleted: the listing of %s lacks %s", self._storage.url, layout.commit(*hidden))
            return []
        self._read(keys)
        records = {key: self._known[key] for key in keys if key in self._known}
        keep = kept(records.values(), self._keep_last, self._keep_for_s, self._clock())
        # One that cannot be read goes once as many as are asked for are newer: this look at it may have been a bad one.
        unread_below = min(keep) if len(keep) >= self._keep_last else None
        surplus = [key for key in keys if key not in keep and (key in records or (unread_below and key < unread_below))]
        self._storage.delete(layout.commit(*key) for key in surplus)
        for key in surplus:
            self._known.pop(key, None)
        named = {records[key].checkpoint for key in keep}
        dropped = {records[key].checkpoint for key in surplus if key in records} - named
        # A record that stays and cannot be read names files that are not known.
        orphans = self._orphans(named, keys) if records.keys() >= set(keys) - set(surplus) else set()
        for name in sorted(dropped | orphans):
            self._storage.delete(info.key for info in self._storage.list(layout.checkpoint(name)))
        self._sweep_uploads()
        return sorted(step for _, step in surplus)

    def _read(self, keys: list[CommitKey]) -> None:
        self._known = {key: record for key, record in self._known.items() if key in set(keys)}
        unread = [key for key in keys if key not in self._known]
        found = in_parallel(lambda key: read_commit(self._storage, key, lambda *_: None), unread, _PARALLEL_READS)
        self._known.update({_key(record): record for record in found if record is not None})

    def _hidden(self, newest: CommitKey, keys: list[CommitKey]) -> CommitKey | None:
        """A commit that is there and that the listing lacks. One that was read before may be gone (a newer attempt, or
        somebody by hand, has deleted it): the record itself is looked at."""
        absent = self._known.keys() - set(keys)
        if newest in absent:
            return newest
        return next((key for key in sorted(absent) if self._storage.info(layout.commit(*key)) is not None), None)

    def _orphans(self, named: Collection[str], listed: Collection[CommitKey]) -> set[str]:
        """Checkpoints of older attempts that no record names: none of them when one has a record after all, by its
        attempt and step, that the listing lacks."""
        names = self._storage.folders(layout.CHECKPOINTS)
        orphans = {name for name in names if name not in named and is_older(name, self._attempt)}
        for key in sorted({key for name in orphans if (key := commit_of(name)) and key not in listed}):
            if self._storage.info(layout.commit(*key)) is not None:
                log.warning("no files are swept: the listing of %s lacks %s", self._storage.url, layout.commit(*key))
                return set()
        return orphans

    def _sweep_uploads(self) -> None:
        """Once per attempt. A store may forbid listing them, which is no reason to stop training."""
        if self._uploads_swept:
            return
        self._uploads_swept = True
        try:
            self._storage.abort_uploads(layout.CHECKPOINTS, lambda key: is_older(key.split("/")[0], self._attempt))
        except MusterError as error:
            log.warning("uploads that dead attempts of %s left behind are not cleared: %s", self._storage.url, error)


def is_older(name: str, attempt: int) -> bool:
    """Whether a checkpoint's name was made by an attempt before ``attempt``; False for names of other making."""
    made = commit_of(name)
    return made is not None and made[0] < attempt


def _key(record: CommitRecord) -> CommitKey:
    return record.attempt, record.step


def _committed_s(record: CommitRecord) -> float:
    """Unix s; a record whose time cannot be read counts as new."""
    try:
        return datetime.fromisoformat(record.committed_at).timestamp()
    except ValueError:
        return float("inf")
