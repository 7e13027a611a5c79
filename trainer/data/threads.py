"""A few threads for a few reads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


def for_each(task: Callable[[T], None], items: Iterable[T], threads: int) -> None:
    """Calls ``task`` on every item, in up to ``threads`` threads; returns when all are done.

    After the first error no further item is begun, and that error is raised. The threads are daemons: a read that goes
    on retrying against a dead storage does not hold up the end of a process.
    """
    todo = list(items)
    if min(threads, len(todo)) <= 1:
        for item in todo:
            task(item)
        return
    _Crew(task, todo).run(min(threads, len(todo)))


class _Crew:
    def __init__(self, task: Callable[[T], None], items: list[T]) -> None:
        self._task, self._items, self._errors = task, iter(items), list[BaseException]()
        self._lock = threading.Lock()

    def run(self, threads: int) -> None:
        crew = [threading.Thread(target=self._work, name=f"muster-read-{i}", daemon=True) for i in range(threads)]
        for thread in crew:
            thread.start()
        for thread in crew:
            thread.join()
        if self._errors:
            raise self._errors[0]

    def _work(self) -> None:
        while True:
            with self._lock:
                left = [] if self._errors else [item for _, item in zip(range(1), self._items, strict=False)]
            if not left:
                return
            try:
                self._task(left[0])
            except BaseException as error:  # whatever it is, it belongs to the caller
                self._errors.append(error)
