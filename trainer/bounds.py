"""Bounds on the CPU time and the memory of this process, for code that works on untrusted input."""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


class OutOfTime(BaseException):
    """The bound of `bounded_cpu` was reached. A BaseException, so that no code on the way handles it as its own."""


@contextmanager
def bounded_cpu(seconds: float) -> Iterator[None]:
    """Raises OutOfTime in the block once this process has used so many ``seconds`` of CPU time, which a busy machine
    does not shorten.

    Only the main thread receives signals: in any other thread there is no bound."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before if before is not None else signal.SIG_DFL)


@contextmanager
def bounded_memory(more: int) -> Iterator[None]:
    """Limits the host memory of this process to ``more`` bytes above its present use; beyond it, allocations fail
    (MemoryError, or a library's own error).

    The limit covers all threads. Has no effect where the kernel does not report the present use (it does on Linux)."""
    try:
        held = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    except OSError:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    least = min(limit for limit in (held + more, soft, hard) if limit != resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_DATA, (least, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
