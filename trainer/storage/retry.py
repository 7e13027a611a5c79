"""Trying again until a deadline: exponential back-off with full jitter, time and chance injected."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from trainer.errors import StorageError
from trainer.storage.backend import Transient

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Retry:
    """Calls a function until it succeeds, fails for good, or ``deadline_s`` have passed since the first attempt.

    Only `Transient` is tried again. The wait before attempt n+1 is drawn evenly from (0, min(cap_s, first_s * 2**n)]:
    many ranks that lost the same server must not come back in step. An attempt that is under way at the deadline is
    not cut off, so a call takes at most the deadline and one request's own timeout.
    """

    deadline_s: float = 120.0
    first_s: float = 0.2
    cap_s: float = 10.0
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    chance: Callable[[], float] = random.random

    def call(self, what: str, attempt: Callable[[], T]) -> T:
        """``what`` names verb and URL for the StorageError that ends a call whose deadline has passed."""
        started, attempts = self.clock(), 0
        while True:
            try:
                return attempt()
            except Transient as error:
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
