"""Processes in which code of the recipe runs.

So that code may hang, use up memory, or end its process, without ending the rank; and its libraries stay out of it.
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
from trainer.tasks.rewards import process

LOADING_S = 600.0
"""Seconds in which the code has to be loaded."""
GRACE_S = 30.0
"""Seconds beyond the time of the calls after which they fail, whatever the processes do."""
LOOK_S = 1.0
CLOSING_S = 10.0


class Children:
    """Spawned processes in ``pools`` pools of ``each`` processes, which load ``specs``. What is scheduled in a pool of
    one process finds there what an earlier call has left. ``setting``: the key of the recipe, ``what``: the code, both
    for messages.

    The processes end with `close`, and with this process, however that ends. Thread-safe."""

    def __init__(self, specs: Sequence[str], setting: str, what: str, *, pools: int = 1, each: int = 1) -> None:
        """Raises InputError for code that cannot be loaded."""
        self._setting, self._what = setting, what
        self._processes = _Processes(pools, each, tuple(specs))
        # Also where this process ends without its exit handlers: a child of multiprocessing waits for its own children.
        self._end = Finalize(self, self._processes.end, exitpriority=0)
        try:
            self._check_loaded(specs)
        except BaseException:
            self.close()
            raise

    def schedule(self, function: Any, *arguments: Any, timeout_s: float | None = None, pool: int = 0) -> Future[Any]:
        try:
            return self._processes.pools[pool].schedule(function, args=arguments, timeout=timeout_s)
        except RuntimeError as error:
            raise RewardFailed(f"a process of the {self._what} has ended between two calls") from error

    def wait(self, calls: Mapping[Future[Any], Any], limit_s: float) -> Future[Any] | None:
        """Waits for all calls; returns at the first one that fails, and returns that one."""
        deadline = time.monotonic() + limit_s
        while True:
            done, pending = wait(calls, LOOK_S, FIRST_EXCEPTION)
            failed = next((call for call in done if call.exception() is not None), None)
            if failed is not None or not pending:
                return failed
            # A call that was scheduled just when they ended would never be answered.
            if not all(pool.active for pool in self._processes.pools):
                raise RewardFailed(f"the processes of the {self._what} have ended")
            if time.monotonic() > deadline:
                raise RewardFailed(f"the processes of the {self._what} did not answer within {limit_s:g} s")

    def close(self) -> None:
        """Ends the processes. Does nothing the second time."""
        self._end()
        self._processes.join()

    def _check_loaded(self, specs: Sequence[str]) -> None:
        named = f"{self._setting} {', '.join(specs)}"
        checks = {self.schedule(process.failure, spec): spec for spec in specs}
        try:
            failed = self.wait(checks, LOADING_S)
        except RewardFailed as error:
            raise InputError(f"{named} cannot be loaded: {error}") from error
        for check, spec in checks.items():
            if failed is not None:
                raise InputError(f"{named} cannot be loaded: {death(failed.exception())}")
            if (why := check.result()) is not None:
                raise InputError(f"{self._setting} {spec!r} {why}")


class _Processes:
    """The pools, and a thread that starts them and lives until they end: the kernel kills the processes when the thread
    that has started them ends."""

    def __init__(self, pools: int, each: int, specs: tuple[str, ...]) -> None:
        context = get_context("spawn")  # the threads of a rank's libraries do not survive a fork
        self._pids = context.SimpleQueue()
        given = (specs, os.getcwd(), os.getpid(), self._pids)
        self.pools = [
            ProcessPool(each, initializer=process.begin, initargs=given, context=context) for _ in range(pools)
        ]
        self._ended = threading.Event()
        started: Future[None] = Future()
        self._thread = threading.Thread(target=self._hold, args=(started,), name="reward-processes", daemon=True)
        self._thread.start()
        started.result()

    def end(self) -> None:
        """Kills the processes and what they have started, without waiting: it may run in any thread."""
        for pool in self.pools:
            pool.stop()
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
            _ = [pool.active for pool in self.pools]  # starts the processes
        except BaseException as error:
            started.set_exception(error)
        else:
            started.set_result(None)
        self._ended.wait()
        for pool in self.pools:
            pool.join()


def death(error: BaseException | None) -> str:
    """Returns how a call ended, as a sentence."""
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
