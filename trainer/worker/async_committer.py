"""Commits snapshots in the background.

One thread and a queue of one: while an upload runs, a newer snapshot replaces one that still waits (the two checkpoints
are coalesced), so that the loop never waits and at most two snapshots are in memory. The final one is never replaced.
That of the best evaluation is replaced only by a better one: another one that follows it is left out, and the final one
waits until its turn has come. The first error is kept and raised in the loop.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import StorageError, note_where
from trainer.run.events import CheckpointEvent
from trainer.worker.train_state import Snapshot

log = logging.getLogger(__name__)

CLOSE_S = 4 * 3600.0
"""Time limit of the last commit. The storage ends an upload without progress; this limit is for a dead local disk."""

Commit = Callable[[Snapshot, Path], Mapping[str, Any]]


@dataclass(frozen=True)
class CheckpointStall:
    """Seconds for which one checkpoint stopped the loop: ``stall_s`` in total, ``snapshot_s`` of it for the copy."""

    stall_s: float
    snapshot_s: float


NO_STALL = CheckpointStall(0.0, 0.0)


@dataclass(frozen=True)
class Lag:
    """How far the storage is behind. ``backlog``: snapshots that are not committed yet, at most 2. ``age_s``: seconds
    since the newest commit, or since the attempt began."""

    backlog: int
    age_s: float


class Committer:
    """``commit(snapshot, folder)`` writes, uploads and commits, and returns {"uri", "bytes"}; rank 0 alone has one."""

    def __init__(
        self, commit: Commit, on_commit: Callable[[CheckpointEvent], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._commit = commit
        self._on_commit = on_commit
        self._clock = clock
        self._newest = clock()
        self._ready = threading.Condition()
        self._waiting: tuple[Snapshot, CheckpointStall] | None = None
        self._working = False
        self._coalesced = 0
        self._closing = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="committer", daemon=True)
        self._thread.start()

    def submit(self, snapshot: Snapshot, held: CheckpointStall = NO_STALL) -> None:
        with self._ready:
            self._raise()
            if self._waiting and self._waiting[0].best and not snapshot.best:
                if not snapshot.final:
                    self._coalesced += 1
                    return
                self._ready.wait_for(lambda: self._waiting is None or self._error is not None)
                self._raise()
            if self._waiting:
                assert not self._waiting[0].final, "nothing comes after the final snapshot"
                self._coalesced += 1
            self._waiting = snapshot, held
            self._ready.notify_all()

    def lag(self) -> Lag:
        with self._ready:
            return Lag(int(self._waiting is not None) + int(self._working), self._clock() - self._newest)

    def check(self) -> None:
        """Raises what the last commit raised, if it did."""
        with self._ready:
            self._raise()

    def close(self) -> None:
        """Waits for everything that was submitted; raises if it could not be committed."""
        if not self.drain():
            raise StorageError(
                f"the last checkpoint was not committed within {CLOSE_S / 3600:g} hours; look at the disk of "
                f"{tempfile.gettempdir()} and at the storage, then run the same command again"
            )
        self.check()

    def drain(self) -> bool:
        """Works like `close`, but never raises: after a failure it saves what was submitted before. Returns False when
        that was not done within `CLOSE_S`."""
        with self._ready:
            self._closing = True
            self._ready.notify_all()
        self._thread.join(CLOSE_S)
        return not self._thread.is_alive()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while True:
            with self._ready:
                self._working = False
                self._ready.wait_for(lambda: self._waiting is not None or self._closing)
                if self._waiting is None:
                    return
                (snapshot, held), self._waiting = self._waiting, None
                self._ready.notify_all()
                coalesced, self._coalesced = self._coalesced, 0
                self._working = True
            try:
                self._run(snapshot, held, coalesced)
            except BaseException as e:
                log.exception("the checkpoint of step %d was not committed", snapshot.step)
                note_where(e, f"step {snapshot.step}, commit of the checkpoint")
                with self._ready:
                    self._error = e
                    self._ready.notify_all()
                return

    def _run(self, snapshot: Snapshot, held: CheckpointStall, coalesced: int) -> None:
        began = self._clock()
        with scratch_folder() as folder:
            done = self._commit(snapshot, folder)
        now = self._clock()
        with self._ready:
            self._newest = now
        self._on_commit(
            CheckpointEvent(
                step=snapshot.step,
                uri=done["uri"],
                stall_s=held.stall_s,
                snapshot_s=held.snapshot_s,
                upload_s=now - began,
                bytes=done["bytes"],
                coalesced=coalesced,
            )
        )


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yields a temporary folder and deletes it at the end of the block."""
    # tempfile.TemporaryDirectory is also deleted when the interpreter exits, while a thread may still write into it.
    folder = Path(tempfile.mkdtemp(prefix="muster-checkpoint-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class StaleAlarm:
    """Rings once when the newest commit is older than ``max_age_s``, and again only after another commit."""

    def __init__(self, max_age_s: float) -> None:
        self._max_age_s = max_age_s
        self._said = False

    def rings(self, age_s: float) -> bool:
        late = age_s > self._max_age_s
        rings = late and not self._said
        self._said = late
        return rings
