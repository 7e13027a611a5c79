"""Startup phases: how the time from the command to the first optimizer step is spent.

The phases follow each other and add up to the total. Several things run at once while a run starts; a phase is the time
that was still to wait for it when the phases before it were over. Every duration is measured by one clock of one
process, and the driver passes seconds on. The exception is the start of the workers: from the driver's request to the
worker's function, by the clocks of their hosts, which may disagree.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

IMPORT, RAY, DATA, WORKERS, MODEL, SAMPLES = "import", "ray", "data", "workers", "model", "samples"
FIRST_STEP = "first_step"
PHASES = (IMPORT, RAY, DATA, WORKERS, MODEL, SAMPLES, FIRST_STEP)
"""The phases in their order. ``import``: the imports of muster and its libraries, and the check of the inputs."""


class Phases:
    """Seconds per phase. `end` ends a phase and adds to it all time since the previous phase ended."""

    def __init__(
        self, began: float, spent: Mapping[str, float] | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._last, self._clock = began, clock
        self._seconds = dict(spent or {})

    def end(self, phase: str) -> None:
        now = self._clock()
        self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._last
        self._last = now

    def spent(self) -> dict[str, float]:
        return {phase: self._seconds.get(phase, 0.0) for phase in PHASES}

    def restart(self) -> None:
        """Begins a new attempt: the phases count from zero."""
        self._last, self._seconds = self._clock(), {}


def process_began(stat: Path = Path("/proc/self/stat")) -> float:
    """Returns when this process was started, in seconds of `time.monotonic`; now, where the system does not report
    it."""
    now = time.monotonic()
    try:
        fields = stat.read_text().rpartition(")")[2].split()
        return now - max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK"))
    except (OSError, IndexError, ValueError, AttributeError):
        return now
