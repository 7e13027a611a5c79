"""Bounds of this process around what works on somebody else's input: time of the processor, and memory."""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


class OutOfTime(BaseException):
    """Nothing on the way may take it for an error of its own."""


@contextmanager
def bounded_cpu(seconds: float) -> Iterator[None]:
    """Raises OutOfTime once this process has computed for so long: a busy machine takes nothing off it.

    In the main thread, which alone hears signals; in any other there is no bound."""
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
    """Refuses memory of the host (MemoryError, or a library's own error) beyond so many bytes ``more`` than are held.

    Where the kernel tells what is held (Linux). The bound is that of the whole process, other threads included."""
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
