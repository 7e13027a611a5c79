"""Bounded waits on a condition, and free ports."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def wait_for(
    condition: Callable[[], T | None],
    what: str,
    timeout_s: float = 30.0,
    every_s: float = 0.05,
    logs: Callable[[], str] = str,
) -> T:
    """The first truthy value of ``condition()``; fails naming ``what``, with ``logs()``, when there is none in time."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > deadline:
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
