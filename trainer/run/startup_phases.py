"""Where the time from the command to the first optimizer step goes.

The phases follow each other and add up to the whole. Several things go on at once while a run starts; a phase is what
was left to wait for when those before it were over. Every duration is measured by one clock of one process: the driver
hands seconds on, never a time of day, since hosts disagree about that. What this leaves out is the message from the
driver to the workers, some milliseconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

IMPORT, RAY, DATA, WORKERS, MODEL, SAMPLES = "import", "ray", "data", "workers", "model", "samples"
FIRST_STEP = "first_step"
PHASES = (IMPORT, RAY, DATA, WORKERS, MODEL, SAMPLES, FIRST_STEP)
"""In their order. ``import``: the program's and the libraries' imports, and the check of the inputs."""


class Phases:
    """Seconds per phase. `end` says that a phase is over; time that nobody has claimed belongs to the next one."""

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
        """A new attempt begins now."""
        self._last, self._seconds = self._clock(), {}


def process_began(stat: Path = Path("/proc/self/stat"), ticks_per_s: int = 100) -> float:
    """When this process was started, in seconds of `time.monotonic`; now, where the system does not tell."""
    now = time.monotonic()
    try:
        fields = stat.read_text().rpartition(")")[2].split()
        return now - max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / ticks_per_s)
    except (OSError, IndexError, ValueError, AttributeError):
        return now
