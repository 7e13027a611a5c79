"""Commits snapshots behind the training loop's back.

One thread, one place in the queue: while an upload runs, a newer snapshot takes the place of one that still waits
(the design allows a due checkpoint to be coalesced with the next), so that the loop never waits and memory stays
bounded at two snapshots. The final one is never replaced. The first error is kept and raised in the loop.
"""

from __future__ import annotations

import logging
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.state import Snapshot

log = logging.getLogger(__name__)

Commit = Callable[[Snapshot, Path], Mapping[str, Any]]


@dataclass(frozen=True)
class Committed:
    """What the metrics and events say of a commit."""

    step: int
    uri: str
    upload_s: float
    bytes: int


class Committer:
    """``commit(snapshot, folder)`` writes, uploads and commits, and returns {"uri", "bytes"}; rank 0 alone has one."""

    def __init__(self, commit: Commit, on_commit: Callable[[Committed], None]) -> None:
        self._commit = commit
        self._on_commit = on_commit
        self._ready = threading.Condition()
        self._waiting: Snapshot | None = None
        self._closing = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="committer", daemon=True)
        self._thread.start()

    def submit(self, snapshot: Snapshot) -> None:
        with self._ready:
            self._raise()
            assert not (self._waiting and self._waiting.final), "nothing comes after the final snapshot"
            self._waiting = snapshot
            self._ready.notify_all()

    def check(self) -> None:
        """Raises what the last commit raised, if it did."""
        with self._ready:
            self._raise()

    def close(self) -> None:
        """Waits for everything that was submitted; raises if it could not be committed. The storage's own deadline
        bounds the wait."""
        self.drain()
        self.check()

    def drain(self) -> None:
        """The same without raising: when training has failed, what was submitted before is worth having."""
        with self._ready:
            self._closing = True
            self._ready.notify_all()
        self._thread.join()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while True:
            with self._ready:
                self._ready.wait_for(lambda: self._waiting is not None or self._closing)
                snapshot, self._waiting = self._waiting, None
            if snapshot is None:
                return
            try:
                self._run(snapshot)
            except BaseException as e:
                log.exception("the checkpoint of step %d was not committed", snapshot.step)
                with self._ready:
                    self._error = e
                return

    def _run(self, snapshot: Snapshot) -> None:
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="muster-checkpoint-") as folder:
            done = self._commit(snapshot, Path(folder))
        self._on_commit(Committed(snapshot.step, done["uri"], time.monotonic() - began, done["bytes"]))
