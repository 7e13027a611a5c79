"""Reading ahead: one thread, a bounded queue, and errors that are raised in the consumer."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Protocol

from trainer.data.types import Cursor, RankStep, StepPlan

DEPTH = 2
_POLL_S = 0.1
_CLOSE_S = 10.0


class StepReader(Protocol):
    """The part of a stream that reading ahead needs."""

    def step(self, cursor: Cursor) -> StepPlan: ...

    def read_step(self, plan: StepPlan, rank: int, world_size: int) -> RankStep: ...

    def ahead(self, plan: StepPlan) -> None: ...


class Prefetcher(Iterator[RankStep]):
    """Steps in order, at most `DEPTH` of them read ahead of the consumer.

    Iteration stops after ``steps`` steps, and after ``close``. ``close`` ends the thread and may be called twice. An
    error is raised once, by the ``next`` that would return its step; then iteration stops.
    """

    def __init__(
        self, source: StepReader, cursor: Cursor, rank: int, world_size: int, steps: int | None = None
    ) -> None:
        self._source, self._cursor, self._steps = source, cursor, steps
        self._rank, self._world_size = rank, world_size
        self._queue: queue.Queue[RankStep | BaseException | None] = queue.Queue(DEPTH)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._produce, name="muster-prefetch", daemon=True)
        self._thread.start()

    def _produce(self) -> None:
        cursor, done = self._cursor, 0
        try:
            while not self._closed.is_set() and (self._steps is None or done < self._steps):
                plan = self._source.step(cursor)
                self._put(self._source.read_step(plan, self._rank, self._world_size))
                self._source.ahead(plan)
                cursor, done = plan.next, done + 1
            self._put(None)
        except BaseException as error:  # any error is raised in the consumer
            self._put(error)

    def _put(self, item: RankStep | BaseException | None) -> None:
        while not self._closed.is_set():
            try:
                return self._queue.put(item, timeout=_POLL_S)
            except queue.Full:
                continue

    def __next__(self) -> RankStep:
        item = None
        while not self._closed.is_set():
            try:
                item = self._queue.get(timeout=_POLL_S)
                break
            except queue.Empty:
                continue
        if isinstance(item, RankStep):
            return item
        self.close()
        if item is not None:
            raise item
        raise StopIteration

    def close(self) -> None:
        """Stops the thread and drops the steps read ahead. Waits up to 10 s for the read in progress."""
        self._closed.set()
        if threading.current_thread() is not self._thread:
            # A read may retry for minutes against a dead storage, and must not delay the end of a run.
            self._thread.join(_CLOSE_S)

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
