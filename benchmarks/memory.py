"""What a process, or a tree of them, has had in memory at most."""

from __future__ import annotations

import re
import resource
from pathlib import Path

PROCESSES = Path("/proc")


def peak_mib(process: str = "self") -> float:
    """The peak of the resident memory of a process since it was started, in MiB; of another than this one only where
    there is /proc.

    Not ``getrusage`` where there is /proc: on Linux a new program inherits its parent's peak there.
    """
    found = _from_proc(process)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 if found is None else found


def peak_of_tree_mib(pid: int) -> float:
    """The sum of the peaks of a process and of all below it that live now, in MiB; 0 if it has ended."""
    import psutil

    try:
        below = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return 0.0
    # A process that has ended meanwhile has none.
    return sum(_from_proc(str(one)) or 0.0 for one in (pid, *(process.pid for process in below)))


def _from_proc(process: str) -> float | None:
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", (PROCESSES / process / "status").read_text())
    except OSError:
        return None
    return int(found[1]) / 1024 if found else None
