"""Waiting for something that may not answer, and no longer than one is willing to."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class Late(Exception):
    """No answer in time."""


def in_time(seconds: float, ask: Callable[[], T]) -> T:
    """What ``ask`` returns or raises; Late when that takes longer. Its thread is then left behind: it ends with the
    process."""
    answers: list[T] = []
    failures: list[Exception] = []

    def work() -> None:
        try:
            answers.append(ask())
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise Late
    if failures:
        raise failures[0]
    return answers[0]
