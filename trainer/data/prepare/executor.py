"""Prepares windows in processes of this machine, without Ray."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any

Map = Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[Any]]
"""As Python's ``map`` with one sequence of jobs."""

_task: Callable[[Any], Any] | None = None


def process_pool(processes: int) -> Map:
    """Returns a ``map`` over ``processes`` spawned processes. Results are in the order of the jobs.

    The function is pickled once per process. A single job runs in this process, without starting another. When a job
    raises, the jobs not started yet are cancelled.
    """

    def run(task: Callable[[Any], Any], jobs: Sequence[Any]) -> Iterator[Any]:
        if len(jobs) <= 1:
            yield from map(task, jobs)
            return
        count = max(1, min(processes, len(jobs)))
        context = multiprocessing.get_context("spawn")  # a tokenizer's threads do not survive a fork
        with _inherited_mask():
            # Python's own process beside them lives as long as this one: a signal to the group must not end it first.
            resource_tracker.ensure_running()
        with ProcessPoolExecutor(count, context, initializer=_take_task, initargs=(task,)) as pool:
            try:
                with _inherited_mask():
                    results = pool.map(_call, jobs)  # starts the processes
                yield from results
            except (KeyboardInterrupt, SystemExit):
                for child in multiprocessing.active_children():  # a window may take longer than the time left to stop
                    child.kill()
                raise
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    return run


@contextmanager
def _inherited_mask() -> Iterator[None]:
    """Blocks the signals of a terminal for processes that are started meanwhile: on Ctrl-C, each of them would print a
    traceback. This process handles them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _take_task(task: Callable[[Any], Any]) -> None:
    global _task
    _task = task
    # The processes already use all cores; more threads of the tokenizers would only slow them down.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _call(job: Any) -> Any:
    assert _task is not None
    return _task(job)
