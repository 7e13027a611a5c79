"""What a process has had in memory at most."""

from __future__ import annotations

import re
import resource
from pathlib import Path

STATUS = Path("/proc/self/status")


def peak_mib() -> float:
    """The peak of this process's resident memory since it was started, in MiB.

    Not ``getrusage`` where there is /proc: on Linux a new program inherits its parent's peak there.
    """
    if STATUS.exists():
        found = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())
        if found:
            return int(found[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
