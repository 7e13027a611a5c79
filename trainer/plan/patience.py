"""Asking what may not answer, and waiting no longer than one is willing to."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Late(Exception):
    """No answer in time."""


class Asked(Generic[T]):
    """A question that is being answered beside what goes on. An answer that nobody waits for ends with the process."""

    def __init__(self, ask: Callable[[], T]) -> None:
        self._answers: list[T] = []
        self._failures: list[Exception] = []
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._work, args=(ask,), daemon=True)
        self._thread.start()

    def _work(self, ask: Callable[[], T]) -> None:
        try:
            self._answers.append(ask())
        except Exception as error:
            self._failures.append(error)

    def answer(self, within_s: float) -> T:
        """What was returned or raised; Late when there is nothing so many seconds after the question was asked."""
        self._thread.join(max(0.0, self._began + within_s - time.monotonic()))
        if self._thread.is_alive():
            raise Late
        if self._failures:
            raise self._failures[0]
        return self._answers[0]
