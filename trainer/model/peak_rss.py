"""How much host memory this process took for something, at its worst."""

from __future__ import annotations

import resource
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class HostPeak:
    """``bytes()``: the process's peak since this object was made, over what it held then.

    Linux lets a process reset its peak; where that is not allowed, the peak of its whole life stands in for it."""

    def __init__(self) -> None:
        self._reset = _reset_peak()
        self._before = resident_bytes()

    def bytes(self) -> int:
        peak = _status("VmHWM") if self._reset else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return max(0, peak - self._before)


def resident_bytes() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def _reset_peak() -> bool:
    try:
        _CLEAR.write_text("5")
        return _status("VmHWM") > 0
    except (OSError, ValueError, StopIteration):
        return False


def _status(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
