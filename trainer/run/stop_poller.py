"""Passes a driver's stop request to its workers: rank 0 reads the run's lease every second."""

from __future__ import annotations

import logging
import threading

from trainer.errors import MusterError
from trainer.run.lease import RUNNING, LeaseRecord, read_lease
from trainer.storage import Storage

log = logging.getLogger(__name__)

POLL_S = 1.0


class StopPoller:
    """``stop_requested`` returns True once the driver is stopping or has ended, or a newer driver has taken the run
    (then this attempt's next commit is fenced). It also returns True when the driver has requested a resize; ``resize``
    is then True. A storage that does not answer changes nothing."""

    def __init__(self, run: Storage, driver: int, *, enabled: bool, poll_s: float = POLL_S) -> None:
        self._run, self._driver, self._poll_s = run, driver, poll_s
        self._stop, self._closed = threading.Event(), threading.Event()
        self._resizes_before: int | None = None
        self.resize = False
        self._thread = threading.Thread(target=self._work, name="stop-watch", daemon=True) if enabled else None

    def stop_requested(self) -> bool:
        return self._stop.is_set()

    def __enter__(self) -> StopPoller:
        if self._thread:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()

    def _work(self) -> None:
        while not self._closed.wait(self._poll_s) and not self._stop.is_set():
            try:
                lease = read_lease(self._run)
            except MusterError as error:
                log.warning("the lease of %s cannot be read: %s", self._run.url, error)
                continue
            if lease is not None:
                self._look(lease)

    def _look(self, lease: LeaseRecord) -> None:
        if self._resizes_before is None:
            self._resizes_before = lease.gathers
        # Only our own driver and newer ones count: one that was overtaken may still write its lease once.
        if lease.driver > self._driver or (lease.driver == self._driver and lease.state != RUNNING):
            self._stop.set()
        elif lease.driver == self._driver and lease.gathers > self._resizes_before:
            self.resize = True
            self._stop.set()
