"""A time limit that relies on no time-out of a library or the kernel.

A request can wait for ever inside an HTTP client (a PUT with ``Expect: 100-continue`` whose reply never starts: the
read time-out of botocore begins only with the reply) or inside the kernel (a file server that is away). Python cannot
end a thread that waits there, so each attempt runs in a thread of its own, which is abandoned when it makes no more
progress. The thread is a daemon: a process that wants to end does not wait for it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from trainer.storage.backend import Moved, NoAnswer

T = TypeVar("T")


def limited(attempt: Callable[[Moved], T], silence_s: float) -> T:
    """Returns the result of ``attempt(moved)``, or raises its error. Raises NoAnswer once ``silence_s`` have passed
    since it began or last called ``moved``."""
    done = threading.Event()
    result: list[T] = []
    errors: list[BaseException] = []
    moved_at = time.monotonic()

    def moved() -> None:
        nonlocal moved_at
        moved_at = time.monotonic()

    def work() -> None:
        try:
            result.append(attempt(moved))
        except BaseException as error:  # it belongs to the caller
            errors.append(error)
        done.set()

    threading.Thread(target=work, name="storage", daemon=True).start()
    while not done.wait(max(0.0, moved_at + silence_s - time.monotonic())):
        if time.monotonic() >= moved_at + silence_s:
            raise NoAnswer(f"no answer within {silence_s:.0f} s")
    if errors:
        raise errors[0]
    return result[0]
