"""Hands the job to pre-started workers, once the inputs are checked and the data are there.

Starting workers and importing their libraries takes longer than anything else before the first step, and needs nothing
that is known only later. So they start first and begin when the driver has the job.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace

from trainer.errors import MusterError
from trainer.run.startup_phases import WORKERS, Phases
from trainer.worker.job import Job

POLL_S = 0.05
LOOK_S = 1.0


class DriverGone(Exception):
    """The driver has left: nothing is to be started or restarted any more."""


class JobHandoff:
    """Set once by the driver's main thread; every worker group waits for it. ``stage``: what a person is waiting for;
    ``failed``: why no group starts any more, once the failure policy has given up."""

    def __init__(self, phases: Phases) -> None:
        self.stage = ""
        self.failed: MusterError | None = None
        self._phases = phases
        self._job: Job | None = None
        self._given, self._left = threading.Event(), threading.Event()

    @property
    def job(self) -> Job | None:
        return self._job

    @property
    def left(self) -> bool:
        return self._left.is_set()

    def give(self, job: Job) -> None:
        self._job = job
        self._given.set()

    def leave(self) -> None:
        self._left.set()

    def check(self) -> None:
        if self.left:
            raise DriverGone

    def lost(self) -> None:
        """A group of workers has ended: the time to the first step of the next one begins."""
        if self._given.is_set():
            self._phases.restart()

    def wait(self, alive: Callable[[], None]) -> Job:
        """The job, with what starting has taken until now. ``alive`` is called now and then, and raises what ends the
        wait; Abandoned when the driver leaves."""
        looked = time.monotonic()
        while not self._given.wait(POLL_S):
            self.check()
            if time.monotonic() - looked >= LOOK_S:
                alive()
                looked = time.monotonic()
        self.check()
        assert self._job is not None
        self._phases.end(WORKERS)
        return replace(self._job, spent=self._phases.spent())
