"""A few threads for a few calls."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_parallel(task: Callable[[T], R], items: Iterable[T], threads: int) -> list[R]:
    """Returns the results of ``task`` for every item, in the items' order, from up to ``threads`` threads.

    After the first error no further item is begun, and that error is raised once the running tasks have ended: with a
    storage that is away this takes one deadline, however many items there are. The threads are daemons: unlike those of
    ``concurrent.futures`` they do not delay the end of the process.
    """
    todo = list(items)
    if min(threads, len(todo)) <= 1:
        return [task(item) for item in todo]
    return _Crew(task, todo).run(min(threads, len(todo)))


class _Crew(Generic[T, R]):
    def __init__(self, task: Callable[[T], R], items: list[T]) -> None:
        self._task, self._items = task, iter(enumerate(items))
        self._results: dict[int, R] = {}
        self._errors: list[BaseException] = []
        self._lock = threading.Lock()

    def run(self, threads: int) -> list[R]:
        crew = [threading.Thread(target=self._work, name=f"storage-{i}", daemon=True) for i in range(threads)]
        for thread in crew:
            thread.start()
        for thread in crew:
            thread.join()
        if self._errors:
            raise self._errors[0]
        return [self._results[i] for i in sorted(self._results)]

    def _work(self) -> None:
        while True:
            with self._lock:
                following = None if self._errors else next(self._items, None)
            if following is None:
                return
            number, item = following
            try:
                self._results[number] = self._task(item)
            except BaseException as error:  # every error belongs to the caller
                self._errors.append(error)
