"""Runs that take turns in one process, and wait for each other before each forward and backward.

Each run has a thread with the ordinary training loop. Only one thread works at a time, in the order of the runs, so
that every rank enters the collectives of all runs in the same order. A thread that needs the model leaves a `ModelPass`
and waits. Once all runs wait, those that go together are answered by one pass of the model, in the thread that has
started the runs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

T = TypeVar("T")

BACKWARD, EVALUATION, TRAINING = range(3)
"""The order in which waiting calls are answered. A backward comes first, since it needs what its forward has left in
the model; then the forwards of runs that evaluate, for which those that train wait."""


class ModelPass:
    """A pass of the model that a run waits for. Calls of one ``order`` and ``kind`` are answered together. ``answer``:
    the result."""

    def __init__(self, order: int, kind: Hashable, asked: Any) -> None:
        self.order, self.kind, self.asked = order, kind, asked
        self.answer: Any = None


class Left(BaseException):
    """Ends a run's thread, since another run has failed in a way that concerns all. Not an Exception, so that nothing
    in the run takes it for a failure of its own. Its text is that of the failure."""


class Turns(Generic[T]):
    """``answer`` gets calls that go together, in the order of their runs, and sets their answers. ``apart(error)``
    returns True for an error of a run that all ranks have at the same place, so that the other runs continue."""

    def __init__(self, answer: Callable[[Sequence[ModelPass]], None], apart: Callable[[BaseException], bool]) -> None:
        self._answer, self._apart = answer, apart
        self._changed = threading.Condition()
        self._turn: int | None = None  # the run that works; None: the thread that has started them
        self._waiting: dict[int, ModelPass] = {}  # in the order in which they began to wait
        self._why_leave: str | None = None
        self._mine = threading.local()

    def run(self, runs: Sequence[Callable[[], T]], prepare_thread: Callable[[], None]) -> list[Future[T]]:
        """Returns the outcome of each run, once all have ended. Raises the error of a run that is not `apart`, and
        errors of ``answer``, after the other runs have been ended. ``prepare_thread`` is called in each thread."""
        ends: list[Future[T]] = [Future() for _ in runs]
        for number, (run, end) in enumerate(zip(runs, ends, strict=True)):
            work = (number, run, end, prepare_thread)
            threading.Thread(target=self._work, args=work, name=f"run-{number}", daemon=True).start()
        ready = list(range(len(runs)))
        try:
            while ready:
                for number in ready:
                    self._give_turn(number)
                    error = ends[number].exception() if ends[number].done() else None
                    if error is not None and not self._apart(error):
                        raise error
                ready = self._answered()
        except BaseException as error:
            self._why_leave = str(error)
            with self._changed:  # a signal may come while a run works
                self._changed.wait_for(lambda: self._turn is None)
            for number in [n for n, end in enumerate(ends) if not end.done()]:
                self._give_turn(number)
            raise
        return ends

    def wait_for(self, call: ModelPass) -> Any:
        """Returns the answer of a call. In the thread of a run it waits for the others; elsewhere nobody else has to
        be waited for."""
        number: int | None = getattr(self._mine, "number", None)
        if number is None:
            self._answer([call])
            return call.answer
        with self._changed:
            self._waiting[number] = call
            self._pass_turn(None)
            self._changed.wait_for(lambda: self._turn == number)
        if self._why_leave is not None:
            raise Left(self._why_leave)
        return call.answer

    def _answered(self) -> list[int]:
        """Answers the calls that come first, and returns their runs; none if no run is left."""
        if not self._waiting:
            return []
        # Of one order the call that has waited longest, so that a run whose calls are of another kind gets its turns.
        first = min(self._waiting.values(), key=lambda call: call.order)
        together = sorted(n for n, c in self._waiting.items() if (c.order, c.kind) == (first.order, first.kind))
        self._answer([self._waiting[number] for number in together])
        for number in together:
            del self._waiting[number]
        return together

    def _give_turn(self, number: int) -> None:
        """Lets a run work until it waits for an answer, or has ended."""
        with self._changed:
            self._pass_turn(number)
            self._changed.wait_for(lambda: self._turn is None)

    def _pass_turn(self, to: int | None) -> None:
        self._turn = to
        self._changed.notify_all()

    def _work(self, number: int, run: Callable[[], T], end: Future[T], prepare_thread: Callable[[], None]) -> None:
        self._mine.number = number
        with self._changed:
            self._changed.wait_for(lambda: self._turn == number)
        try:
            if self._why_leave is not None:
                raise Left(self._why_leave)
            prepare_thread()
            end.set_result(run())
        except BaseException as error:  # whatever it is, it belongs to the thread that has started the runs
            end.set_exception(error)
        finally:
            with self._changed:
                self._pass_turn(None)
