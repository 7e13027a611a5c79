"""The training itself as Ray Train runs it: the function of each worker, what a failure means, and the wait for it."""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from launcher.raytrain.environment import Environment
from launcher.raytrain.handoff import JobHandoff
from launcher.raytrain.policies import FailurePolicy, ResizeRequested, WorkerCountPolicy, cause_of
from launcher.raytrain.worker_group import GroupConfig, controller_for
from trainer.errors import MusterError
from trainer.recipe import Recipe, ResourcesSection
from trainer.run.failure import WorkerError, useful_stack
from trainer.storage import open_storage
from trainer.worker.job import Job

log = logging.getLogger(__name__)

START_ATTEMPTS = 3
NEEDLESS = (PlacementGroupCleanerCallback, DatasetsCallback)
"""Both start an actor: one cleans up after a controller that is an actor and has died, one serves Ray's data sets."""


class Worker:
    """The function that Ray Train calls on each worker. It is pickled, with the environment inside."""

    def __init__(self, job: Job, environment: Environment) -> None:
        self._job, self._environment = job, environment

    def __call__(self) -> None:
        from ray.train import get_context

        self._environment.apply()
        rank = get_context().get_world_rank()
        try:
            _train(self._job, rank)
        except ResizeRequested:
            raise
        except Exception as error:
            raise WorkerError.of(error, time.time(), rank, os.uname().nodename, useful_stack(error)) from None


def _train(job: Job, rank: int) -> None:
    from trainer.errors import Interrupted
    from trainer.logs.rank import rank_log
    from trainer.run.stop_poller import StopPoller
    from trainer.worker.attempt import train

    run = open_storage(job.storage).child(job.recipe.name)
    with StopPoller(run, job.driver, enabled=rank == 0) as watch:
        try:
            with rank_log(run, rank):
                train(job, watch.stop_requested)
        except Interrupted as stopped:
            log.info("%s", stopped)
            if watch.gather:
                raise ResizeRequested(str(stopped)) from None


class Trainer(DataParallelTrainer):
    """Ray Train with these policies instead of its own, which have no hooks, and its controller in this process."""

    def __init__(
        self, recipe: Recipe, order: JobHandoff, environment: Environment, folder: str, *, autoscaled: bool
    ) -> None:
        resources = recipe.resources
        self._failures = FailurePolicy(_failure_config(resources), recipe, order, environment)
        self._sizes = WorkerCountPolicy(scaling(resources), resources, autoscaled=autoscaled)
        self._controller = controller_for(order, environment, partial(Worker, environment=environment))
        run: Any = RunConfig(name=recipe.name, storage_path=folder, failure_config=_failure_config(resources))
        super().__init__(
            _no_job,
            backend_config=GroupConfig(gpu=resources.gpus_per_worker > 0),
            scaling_config=scaling(resources),
            run_config=run,
        )

    def _initialize_and_run_controller(self, **settings: Any) -> Any:
        callbacks = [callback for callback in settings["callbacks"] if not isinstance(callback, NEEDLESS)]
        policies = {"failure_policy": self._failures, "scaling_policy": self._sizes}
        controller = self._controller(**{**settings, **policies, "callbacks": callbacks})
        asyncio.run(controller.run())
        return controller.get_result()


def _no_job() -> None:
    raise AssertionError("workers get the function of their job")


def _failure_config(resources: ResourcesSection) -> FailureConfig:
    return FailureConfig(max_failures=resources.max_failures, controller_failure_limit=START_ATTEMPTS - 1)


def scaling(resources: ResourcesSection) -> ScalingConfig:
    return ScalingConfig(
        num_workers=(resources.min_workers, resources.max_workers),
        use_gpu=resources.gpus_per_worker > 0,
        resources_per_worker={"CPU": resources.cpus_per_worker, "GPU": resources.gpus_per_worker},
        placement_strategy=resources.placement.upper(),
        accelerator_type=resources.accelerator_type,
        label_selector=dict(resources.labels) or None,
    )


class Fit:
    """Ray Train in a thread of its own, so that the main thread keeps its signals and the screen.

    The folder is Ray Train's scratch space on the driver's host: checkpoints do not go through it."""

    def __init__(self, recipe: Recipe, order: JobHandoff, environment: Environment, *, autoscaled: bool) -> None:
        self.error: BaseException | None = None
        self._order = order
        self._trainer = partial(Trainer, recipe, order, environment, autoscaled=autoscaled)
        self._thread = threading.Thread(target=self._run, name="ray-train", daemon=True)
        self._thread.start()

    @property
    def failed(self) -> MusterError | None:
        """The failure that the policy has given up at."""
        return self._order.failed

    def wait(self, timeout_s: float) -> bool:
        """Returns True if it has ended by then."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def leave(self, timeout_s: float) -> bool:
        """Ends the controller as soon as possible, so that it does not continue in a Ray that has gone. Returns True if
        it has ended."""
        self._order.leave()
        return self.wait(timeout_s)

    def _run(self) -> None:
        try:
            with tempfile.TemporaryDirectory(prefix="muster-ray-train-") as folder:
                self._trainer(folder).fit()
        except BaseException as error:
            self.error = error


def follow(running: Fit, every: Callable[[], None], poll_s: float) -> None:
    """Waits for the end of the training, calling ``every`` each ``poll_s`` seconds. Raises the first cause of a
    failure."""
    while not running.wait(poll_s):
        every()
    every()
    if running.error is not None:
        raise (running.failed or cause_of(running.error).as_error()) from running.error
