"""What a process has had in memory at most."""

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
    if (status := PROCESSES / process / "status").exists():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found:
            return int(found[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
