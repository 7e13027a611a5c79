"""Bounded waits on a condition, and free ports."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


class IdleClock:
    """Counts the seconds that a machine without other load would have taken: a second counts less while more processes
    want to run than there are cores. It is read often, since the load changes."""

    def __init__(self) -> None:
        self._seconds, self._read = 0.0, time.monotonic()

    def seconds(self) -> float:
        now, load = time.monotonic(), os.getloadavg()[0]
        self._seconds += (now - self._read) * min(1.0, (os.cpu_count() or 1) / max(load, 1e-3))
        self._read = now
        return self._seconds


def wait_for(
    condition: Callable[[], T | None],
    what: str,
    timeout_s: float = 30.0,
    every_s: float = 0.05,
    logs: Callable[[], str] = str,
) -> T:
    """The first truthy value of ``condition()``; fails naming ``what``, with ``logs()``, when there is none in
    ``timeout_s`` seconds of an IdleClock."""
    clock = IdleClock()
    while not (value := condition()):
        if clock.seconds() > timeout_s:
            raise AssertionError(f"{what}: not within {timeout_s:g} s\n{logs()}".rstrip())
        time.sleep(every_s)
    return value


def tail(log: Path, size: int = 3000) -> str:
    return f"{log}:\n{log.read_text(errors='replace')[-size:]}" if log.exists() else f"{log}: not there"


def free_port() -> int:
    """A TCP port on the loopback that was free a moment ago."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def listening(port: int, address: str = "127.0.0.1") -> bool:
    try:
        socket.create_connection((address, port), 0.5).close()
    except OSError:
        return False
    return True
