"""Runs Python programs that a model has written, with limits on what they use up.

The limits stop accidents: endless loops, full disks and memories, programs that start others, requests to the network.
They are no security boundary: a program reads what this user may read, and may write where this user may.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from trainer.tasks.rewards import sandbox_start

WALL_S = 10.0
"""Seconds until a program is killed. It may compute for half of them (`sandbox_start`)."""
KEPT = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH")
"""Environment variables that a program gets; many of the others are credentials."""
LONGEST_POLL_S = 0.05


def run_all(programs: Sequence[str], limit_s: float = WALL_S) -> list[bool]:
    """Returns for each program if it ran to its end without an exception. As many as there are cores run at a time."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda program: _runs(program, limit_s), programs))


def _runs(program: str, limit_s: float) -> bool:
    # A random code at the end, not 0: a program that calls exit() before its tests would have passed them.
    code = random.SystemRandom().randint(32, 126)
    with tempfile.TemporaryDirectory(prefix="muster-program-", ignore_cleanup_errors=True) as folder:
        file = Path(folder, "program.py")
        file.write_text(f"{program}\nraise SystemExit({code})\n", errors="replace")
        started = subprocess.Popen(
            [sys.executable, "-I", sandbox_start.__file__, str(file)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={**{name: os.environ[name] for name in KEPT if name in os.environ}, "HOME": folder, "TMPDIR": folder},
            start_new_session=True,
        )
        try:
            _await_end(started.pid, limit_s)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)
        return started.wait() == code


def _await_end(pid: int, limit_s: float) -> None:
    """Waits until the process has ended, or for ``limit_s``. Leaves its exit code, so that its number still stands for
    its group."""
    deadline, pause_s = time.monotonic() + limit_s, 0.001
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None and time.monotonic() < deadline:
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_POLL_S)
