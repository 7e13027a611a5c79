"""The GPUs of this machine, asked of NVIDIA's own program, so that no torch is needed."""

from __future__ import annotations

import subprocess

COMMAND = ("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits")
SECONDS = 10


def gpus_here() -> tuple[int, ...]:
    """Returns the memory of each GPU in bytes; () without GPUs."""
    try:
        told = subprocess.run(COMMAND, capture_output=True, text=True, timeout=SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(int(line) << 20 for line in told.split() if line.isdecimal())
