"""Calls with a time limit, for storages that may never answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Late(Exception):
    """The call did not return in time."""


class Asked(Generic[T]):
    """A call that runs on a daemon thread, which does not keep the process alive."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._answers: list[T] = []
        self._failures: list[Exception] = []
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._work, args=(call,), daemon=True)
        self._thread.start()

    def _work(self, call: Callable[[], T]) -> None:
        try:
            self._answers.append(call())
        except Exception as error:
            self._failures.append(error)

    def answer(self, within_s: float) -> T:
        """Returns or raises the call's result; raises Late if it has none ``within_s`` after the call began."""
        self._thread.join(max(0.0, self._began + within_s - time.monotonic()))
        if self._thread.is_alive():
            raise Late
        if self._failures:
            raise self._failures[0]
        return self._answers[0]
