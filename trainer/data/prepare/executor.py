"""Preparing windows in processes of this machine, where there is no Ray to do it."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

_task: Callable[[Any], Any] | None = None


def process_pool(processes: int) -> Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[Any]]:
    """A ``map`` over that many spawned processes, results in order; the function is pickled once per process. A single
    job runs in this process, where it costs no start.

    Spawned, not forked: a tokenizer's threads do not survive a fork. When a job raises, those not begun are cancelled.
    """

    def run(task: Callable[[Any], Any], jobs: Sequence[Any]) -> Iterator[Any]:
        if len(jobs) <= 1:
            yield from map(task, jobs)
            return
        count = max(1, min(processes, len(jobs)))
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(count, context, initializer=_take_task, initargs=(task,)) as pool:
            try:
                yield from _mapped(pool, jobs)
            except (KeyboardInterrupt, SystemExit):
                for child in multiprocessing.active_children():  # a window may take longer than an end may
                    child.kill()
                raise
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    return run


def _mapped(pool: ProcessPoolExecutor, jobs: Sequence[Any]) -> Iterator[Any]:
    """The results. A terminal's signals are this process's to answer: of the processes, which are started here, each
    would print a traceback."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGHUP))
    try:
        return pool.map(_call, jobs)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _take_task(task: Callable[[Any], Any]) -> None:
    global _task
    _task = task
    # The processes share the cores already; a tokenizer's own threads on top only get in each other's way.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _call(job: Any) -> Any:
    assert _task is not None
    return _task(job)
