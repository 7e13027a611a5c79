"""This machine as the place where attempts of one worker run: in a child process of the driver, without Ray.

The child imports its libraries before it is given a job.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from typing import Any

from launcher.attempt import AttemptFailed, death, run_rank
from launcher.capacity import Node
from launcher.child import Child, ChildEnded
from trainer.data.prepare.executor import Map, process_pool
from trainer.errors import Interrupted
from trainer.recipe import Recipe, ResourcesSection
from trainer.run.failure import WorkerError
from trainer.worker.job import Job


def needs_no_ray(resources: ResourcesSection, servers: int = 0) -> bool:
    """Returns True for one worker that may run anywhere, without ``servers`` next to it."""
    return resources.max_workers == 1 and not (servers or resources.labels or resources.accelerator_type)


class LocalRunner:
    """Entered, it has a child that waits for a job."""

    def __init__(self, recipe: Recipe) -> None:
        self._resources = recipe.resources
        self._attempt: LocalAttempt | None = None

    def __enter__(self) -> LocalRunner:
        self._attempt = LocalAttempt()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._attempt is not None:
            self._attempt.kill()

    def nodes(self) -> list[Node]:
        total = {"CPU": float(self._resources.cpus_per_worker), "GPU": float(self._resources.gpus_per_worker)}
        return [Node("local", os.uname().nodename, "", True, total, total)]

    all_nodes = nodes

    def await_resources(self, expected_nodes: int, stopped: Callable[[], bool]) -> None:
        """No effect: the worker itself reports a GPU that is missing."""

    def ask_for(self, workers: int) -> None:
        """No effect: no node can be added."""

    def map(self, stopped: Callable[[], bool]) -> Map:
        return _until(stopped, process_pool(os.cpu_count() or 1))

    def map_beside(self, stopped: Callable[[], bool]) -> Map:
        return _until(stopped, process_pool(max(1, (os.cpu_count() or 1) - self._resources.cpus_per_worker)))

    def start(self, job: Job, workers: int) -> LocalAttempt:
        if self._attempt is None or self._attempt.used:
            self._attempt = LocalAttempt()
        self._attempt.begin(job)
        return self._attempt


def _until(stopped: Callable[[], bool], mapped: Map) -> Map:
    """Returns a map that raises Interrupted after the first result once ``stopped()``."""

    def run(task: Callable[[Any], Any], jobs: Sequence[Any]) -> Iterator[Any]:
        for result in mapped(task, jobs):
            yield result
            if stopped():
                raise Interrupted("stopped while data was being prepared")

    return run


class LocalWorker:
    """In the child. Its output is stored with the run (`trainer.logs.rank`), and not shown."""

    def __init__(self) -> None:
        from trainer.fast_imports import load_libraries

        load_libraries()
        import trainer.worker.attempt  # noqa: F401

    def train(self, job: Job) -> None:
        run_rank(job, 0, 1)


class LocalAttempt:
    """A child process that trains one job."""

    def __init__(self) -> None:
        self._child = Child(LocalWorker, "muster-worker")
        self._outcome: Future[None] | None = None

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def used(self) -> bool:
        """True for an attempt that was begun."""
        return self._outcome is not None

    def begin(self, job: Job) -> None:
        self._outcome = self._child.submit("train", job)

    def wait(self, timeout_s: float) -> bool:
        assert self._outcome is not None
        return bool(wait([self._outcome], timeout_s).done)

    def result(self) -> None:
        assert self._outcome is not None
        try:
            self._outcome.result()
        except WorkerError as error:
            raise AttemptFailed(error.cause) from error
        except ChildEnded as ended:
            raise AttemptFailed(death(0, str(ended))) from ended
        finally:
            self.kill()

    def kill(self) -> None:
        self._child.kill()
