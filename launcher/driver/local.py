"""This machine as the place where attempts of one worker run: in a child process of the driver, without Ray.

The child starts and imports its libraries before it is given a job. It ends with the driver, however that ends, since
the pipe between the two is closed then.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

from launcher.attempt import AttemptFailed, ResizeRequested, death, run_rank
from launcher.capacity import Node
from trainer.data.prepare.executor import Map, process_pool
from trainer.errors import Interrupted
from trainer.recipe import Recipe, ResourcesSection
from trainer.run.failure import WorkerError
from trainer.worker.job import Job

BEAT_S = 1.0
SILENCE_S = 120.0
"""A child that has sent nothing for so long is stopped or hangs, and is killed."""
DRIVERS_SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)
"""Signals that a terminal or a scheduler sends to the whole group of processes: the driver handles them."""


def needs_no_ray(resources: ResourcesSection) -> bool:
    """Returns True for one worker that may run anywhere."""
    return resources.max_workers == 1 and not resources.labels and resources.accelerator_type is None


class LocalRunner:
    """Entered, it has a child that waits for a job."""

    def __init__(self, recipe: Recipe) -> None:
        self._resources = recipe.resources
        self._waiting: LocalAttempt | None = None

    def __enter__(self) -> LocalRunner:
        self._waiting = LocalAttempt()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._waiting is not None:
            self._waiting.kill()

    def nodes(self) -> list[Node]:
        total = {"CPU": float(self._resources.cpus_per_worker), "GPU": float(self._resources.gpus_per_worker)}
        return [Node("local", os.uname().nodename, "", True, total, total)]

    def await_resources(self, expected_nodes: int, stopped: Callable[[], bool]) -> None:
        """No effect: the worker itself reports a GPU that is missing."""

    def ask_for(self, workers: int) -> None:
        """No effect: no node can be added."""

    def map(self, stopped: Callable[[], bool]) -> Map:
        return _until(stopped, process_pool(os.cpu_count() or 1))

    def map_beside(self, stopped: Callable[[], bool]) -> Map:
        return _until(stopped, process_pool(max(1, (os.cpu_count() or 1) - self._resources.cpus_per_worker)))

    def start(self, job: Job, workers: int) -> LocalAttempt:
        attempt, self._waiting = self._waiting or LocalAttempt(), None
        if attempt.wait(0):  # it died while it waited
            attempt = LocalAttempt()
        attempt.begin(job)
        self._waiting = attempt
        return attempt


def _until(stopped: Callable[[], bool], mapped: Map) -> Map:
    """Returns a map that raises Interrupted after the first result once ``stopped()``."""

    def run(task: Callable[[Any], Any], jobs: Sequence[Any]) -> Iterator[Any]:
        for result in mapped(task, jobs):
            yield result
            if stopped():
                raise Interrupted("stopped while data was being prepared")

    return run


class LocalAttempt:
    """A child process and the pipe to it."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._child = context.Process(target=_work, args=(theirs,), name="muster-worker")
        before = signal.pthread_sigmask(signal.SIG_BLOCK, DRIVERS_SIGNALS)  # the child inherits the mask
        try:
            self._child.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        self._heard_at = time.monotonic()
        self._outcome: BaseException | None = None
        self._ended = False

    @property
    def pid(self) -> int:
        assert self._child.pid is not None
        return self._child.pid

    def begin(self, job: Job) -> None:
        try:
            self._pipe.send(job)
        except OSError:  # it has died, which `wait` finds
            return

    def wait(self, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while not self._ended:
            try:
                if self._pipe.poll(max(0.0, deadline - time.monotonic())):
                    self._take(self._pipe.recv())
                    continue
            except (EOFError, OSError):
                self._child.join()
                self._ended = True
                self._outcome = self._outcome or AttemptFailed(death(0, _ended(self._child.exitcode)))
                return True
            if time.monotonic() - self._heard_at >= SILENCE_S:
                self.kill()
                silent = f"its process had not answered for {SILENCE_S:.0f} s and was killed"
                self._ended, self._outcome = True, AttemptFailed(death(0, silent))
            if time.monotonic() >= deadline:
                break
        return self._ended

    def result(self) -> None:
        if isinstance(self._outcome, WorkerError):
            raise AttemptFailed(self._outcome.cause) from self._outcome
        if self._outcome is not None:
            raise self._outcome

    def kill(self) -> None:
        self._child.kill()

    def _take(self, message: tuple[str, BaseException | None]) -> None:
        kind, error = message
        self._heard_at = time.monotonic()
        if kind == "ended":
            self._child.join()
            self._ended, self._outcome = True, error


def _ended(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"killed by {signal.Signals(-exit_code).name}"
    return f"its process ended with exit code {exit_code}"


def _work(pipe: Connection) -> None:
    """In the child. Its output is stored with the run (`trainer.logs.rank`), and not shown."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    ready, job = threading.Event(), list[Job]()
    sending = threading.Lock()

    def send(kind: str, error: BaseException | None = None) -> None:
        with sending:
            pipe.send((kind, error))

    def listen() -> None:
        try:
            while True:
                job.append(pipe.recv())
                ready.set()
        except (EOFError, OSError):
            os.kill(os.getpid(), signal.SIGKILL)  # the driver is gone

    def beat() -> None:
        while True:
            send("beat")
            time.sleep(BEAT_S)

    threading.Thread(target=listen, daemon=True).start()
    threading.Thread(target=beat, daemon=True).start()
    _preload()
    ready.wait()
    outcome: BaseException | None = None
    try:
        run_rank(job[0], 0)
    except (ResizeRequested, WorkerError) as error:
        outcome = error
    send("ended", outcome)


def _preload() -> None:
    from trainer.fast_imports import load_libraries

    load_libraries()
    import trainer.worker.attempt  # noqa: F401
