"""The peak of this process's host memory while something was done."""

from __future__ import annotations

import resource
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class HostPeak:
    """A measurement that begins when the object is made. ``bytes()``: the rise of the process's memory to its peak.

    Linux lets a process reset its peak; where that is not allowed, the peak since the process began is used."""

    def __init__(self) -> None:
        try:
            _CLEAR.write_text("5")
            self._reset = _status("VmHWM") > 0
        except (OSError, ValueError, StopIteration):
            self._reset = False
        self._before = resident_bytes()

    def bytes(self) -> int:
        peak = _status("VmHWM") if self._reset else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return max(0, peak - self._before)


def resident_bytes() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def _status(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
