"""Rewards and scores of texts, computed by Python functions that the recipe names, in processes of their own.

So a function may hang, use up memory, or end its process, without ending the rank; and its libraries stay out of it.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.util import Finalize
from typing import Any

from pebble import ProcessExpired, ProcessPool

from trainer.errors import InputError, RewardFailed
from trainer.recipe.sections.rollouts.reward import RewardFunctionSection
from trainer.tasks.rewards import process

LOADING_S = 600.0
"""Seconds in which the functions have to be loaded."""
GRACE_S = 30.0
"""Seconds beyond the time of the functions after which a call fails, whatever the processes do."""
LOOK_S = 1.0
CLOSING_S = 10.0


class RewardFunctions:
    """Calls functions in ``processes`` spawned processes, and checks their results. Each process loads all of them
    once. ``setting``: the key of the recipe in messages.

    The processes end with `close`, and with this process, however that ends. A failure ends them too. Thread-safe."""

    def __init__(
        self, rows: Sequence[RewardFunctionSection], processes: int = 1, setting: str = "ppo.reward.function"
    ) -> None:
        """Raises InputError for a function that cannot be loaded."""
        self.rows, self._setting = tuple(rows), setting
        specs = tuple(dict.fromkeys(row.function for row in rows))
        self._processes = _Processes(processes, specs)
        # Also where this process ends without its exit handlers: a child of multiprocessing waits for its own children.
        self._end = Finalize(self, self._processes.end, exitpriority=0)
        try:
            self._check_loaded(specs)
        except BaseException:
            self.close()
            raise

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], references: Sequence[str]
    ) -> dict[str, list[float]]:
        """Returns a number for each completion, by the names of the functions, which run at the same time. Raises
        RewardFailed, which is not retried, if one of them fails or takes longer than its time."""
        if not completions:
            return {row.label: [] for row in self.rows}
        texts = [*prompts], [*completions], [*references]
        calls: dict[Future[Any], RewardFunctionSection] = {}
        try:
            for row in self.rows:
                calls[self._schedule(process.call, row.function, *texts, timeout_s=row.timeout_s)] = row
            failed = self._wait(calls, sum(row.timeout_s for row in self.rows) + GRACE_S)
            if failed is not None:
                raise _explained(calls[failed], len(completions), failed.exception())
        except BaseException:
            self.close()
            raise
        return {row.label: call.result() for call, row in calls.items()}

    def close(self) -> None:
        """Ends the processes. Does nothing the second time."""
        self._end()
        self._processes.join()

    def _check_loaded(self, specs: Sequence[str]) -> None:
        checks = {self._schedule(process.failure, spec): spec for spec in specs}
        try:
            failed = self._wait(checks, LOADING_S)
        except RewardFailed as error:
            raise InputError(f"{self._setting} {', '.join(specs)} cannot be loaded: {error}") from error
        for check, spec in checks.items():
            if failed is not None:
                raise InputError(f"{self._setting} {', '.join(specs)} cannot be loaded: {_death(failed.exception())}")
            if (why := check.result()) is not None:
                raise InputError(f"{self._setting} {spec!r} {why}")

    def _schedule(self, function: Any, *arguments: Any, timeout_s: float | None = None) -> Future[Any]:
        try:
            return self._processes.pool.schedule(function, args=arguments, timeout=timeout_s)
        except RuntimeError as error:
            raise RewardFailed("a process of the reward functions has ended between two calls") from error

    def _wait(self, calls: Mapping[Future[Any], Any], limit_s: float) -> Future[Any] | None:
        """Waits for all calls; returns at the first one that fails, and returns that one."""
        deadline = time.monotonic() + limit_s
        while True:
            done, pending = wait(calls, LOOK_S, FIRST_EXCEPTION)
            failed = next((call for call in done if call.exception() is not None), None)
            if failed is not None or not pending:
                return failed
            if not self._processes.pool.active:  # a call that was scheduled just then would never be answered
                raise RewardFailed("the processes of the reward functions have ended")
            if time.monotonic() > deadline:
                raise RewardFailed(f"the processes of the reward functions did not answer within {limit_s:g} s")


class _Processes:
    """The pool, and a thread that starts it and lives until it ends: the kernel kills the processes when the thread
    that has started them ends."""

    def __init__(self, count: int, specs: tuple[str, ...]) -> None:
        context = get_context("spawn")  # the threads of a rank's libraries do not survive a fork
        self._pids = context.SimpleQueue()
        arguments = (specs, os.getcwd(), os.getpid(), self._pids)
        self.pool = ProcessPool(count, initializer=process.begin, initargs=arguments, context=context)
        self._ended = threading.Event()
        started: Future[None] = Future()
        self._thread = threading.Thread(target=self._hold, args=(started,), name="reward-processes", daemon=True)
        self._thread.start()
        started.result()

    def end(self) -> None:
        """Kills the processes and what they have started, without waiting: it may run in any thread."""
        self.pool.stop()
        while not self._pids.empty():
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._pids.get(), signal.SIGKILL)
        self._ended.set()

    def join(self) -> None:
        self._thread.join(CLOSING_S)

    def _hold(self, started: Future[None]) -> None:
        # The processes, and Python's own one beside them, inherit the mask: a signal to all processes of a job must not
        # end them before they have handlers.
        signal.pthread_sigmask(signal.SIG_BLOCK, process.PARENTS_SIGNALS)
        try:
            _ = self.pool.active  # starts the processes
        except BaseException as error:
            started.set_exception(error)
        else:
            started.set_result(None)
        self._ended.wait()
        self.pool.join()


def _explained(row: RewardFunctionSection, count: int, error: BaseException | None) -> BaseException:
    if isinstance(error, RewardFailed):
        return RewardFailed(*error.args)
    if isinstance(error, TimeoutError):
        return RewardFailed(
            f"{row.function} did not return within {row.timeout_s:g} s for {count} texts; a function has to return "
            "within its timeout_s"
        )
    return RewardFailed(f"{row.function} was rating {count} texts: {_death(error)}")


def _death(error: BaseException | None) -> str:
    if isinstance(error, ProcessExpired):
        code = int(error.exitcode)
        if code == -signal.SIGKILL:
            return "its process was killed by SIGKILL, which the kernel sends when memory is used up"
        if code < 0:
            return f"its process was killed by {signal.Signals(-code).name}"
        return f"its process ended with exit code {code}"
    if isinstance(error, BrokenProcessPool):
        return "its process ended before it answered"
    return f"{type(error).__name__}: {error}"


def weighted(by_name: Mapping[str, Sequence[float]], weights: Mapping[str, float]) -> list[float]:
    """Returns the weighted sum of the rewards of each text. ``by_name``: the rewards of the texts by the name of the
    reward; there is a weight for each name."""
    columns = [[weights[name] * value for value in values] for name, values in by_name.items()]
    return [sum(row) for row in zip(*columns, strict=True)]
