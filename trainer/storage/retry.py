"""Retries until a deadline: exponential back-off with full jitter; clock and random source are injected."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from trainer.errors import StorageError
from trainer.storage.backend import Moved, NoAnswer, Transient
from trainer.storage.limit import limited

T = TypeVar("T")
log = logging.getLogger(__name__)
SLOWEST_BYTES_S = 2**20
"""A slower transfer counts as hung."""


@dataclass(frozen=True)
class Retry:
    """Calls a function until it succeeds, fails permanently, or ``deadline_s`` have passed since the first attempt.

    Only `Transient` is retried. The wait before attempt n+1 is drawn evenly from (0, min(cap_s, first_s * 2**n)]:
    many ranks that lost the same server must not return at the same time.

    An attempt is abandoned when it makes no progress for ``attempt_s`` or for the time until the deadline, whichever is
    shorter, and at least ``least_s``. An attempt that moves bytes gets in addition the time that they need at
    `SLOWEST_BYTES_S`, even beyond the deadline.
    """

    deadline_s: float = 120.0
    first_s: float = 0.2
    cap_s: float = 10.0
    attempt_s: float = 30.0
    least_s: float = 1.0
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    chance: Callable[[], float] = random.random
    limited: Callable[[Callable[[Moved], T], float], T] = limited

    def call(
        self,
        what: str,
        attempt: Callable[[Moved], T],
        *,
        transfer_bytes: int = 0,
        on_no_answer: Callable[[], None] = lambda: None,
    ) -> T:
        """Returns the result of ``attempt``. Raises StorageError when the deadline has passed; ``what`` names verb and
        URL in it. ``transfer_bytes`` is the most that an attempt moves without calling ``moved``."""
        started, attempts = self.clock(), 0
        while True:
            silence_s = max(self.least_s, min(self.attempt_s, self.deadline_s - (self.clock() - started)))
            try:
                return self.limited(attempt, silence_s + transfer_bytes / SLOWEST_BYTES_S)
            except Transient as error:
                if isinstance(error, NoAnswer):
                    on_no_answer()
                attempts += 1
                wait_s = max(1e-3, self.chance() * min(self.cap_s, self.first_s * 2.0 ** min(attempts, 30)))
                elapsed_s = self.clock() - started
                if elapsed_s + wait_s > self.deadline_s:
                    raise StorageError(
                        f"could not {what}: {attempts} attempts within {elapsed_s:.0f} s failed, the last one with "
                        f"{error}. Check the network and the storage's health, then run the same command again."
                    ) from error
                log.debug("attempt %d to %s failed (%s); next in %.1f s", attempts, what, error, wait_s)
                self.sleep(wait_s)
