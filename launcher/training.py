"""The training itself as Ray Train runs it: the function of each worker, what a failure means, and the wait for it."""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from ray.train.torch import TorchConfig
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.torch.torch_trainer import TorchTrainer

from launcher.causes import Failure
from launcher.environment import Environment
from launcher.policies import FailurePolicy, Gathered, SizePolicy, cause_of, explained
from trainer.recipe import ResourcesSection
from trainer.storage import open_storage
from trainer.worker import Job
from trainer.world import backend_of

log = logging.getLogger(__name__)

START_ATTEMPTS = 3
COLLECTIVE_TIMEOUT_S = 1800


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
        except Gathered:
            raise
        except Exception as error:
            trace = traceback.format_exc()
            raise Failure.of(error, time.time(), rank, os.uname().nodename, trace) from None


def _train(job: Job, rank: int) -> None:
    from trainer.errors import Interrupted
    from trainer.logs.rank import rank_log
    from trainer.watch import StopWatch
    from trainer.worker import train

    run = open_storage(job.storage).child(job.recipe.name)
    with StopWatch(run, job.driver, enabled=rank == 0) as watch:
        try:
            with rank_log(run, rank):
                train(job, watch.stop_requested)
        except Interrupted as stopped:
            log.info("%s", stopped)
            if watch.gather:
                raise Gathered(str(stopped)) from None


class Trainer(TorchTrainer):
    """TorchTrainer with these policies in the place of its own, which have no hooks."""

    def __init__(self, job: Job, environment: Environment, folder: str) -> None:
        resources = job.recipe.resources
        self._failures = FailurePolicy(_failure_config(resources), job, environment)
        self._sizes = SizePolicy(scaling(resources), resources)
        super().__init__(
            Worker(job, environment),
            torch_config=TorchConfig(
                backend=backend_of(gpu=resources.gpus_per_worker > 0), timeout_s=COLLECTIVE_TIMEOUT_S
            ),
            scaling_config=scaling(resources),
            run_config=RunConfig(name=job.recipe.name, storage_path=folder, failure_config=_failure_config(resources)),
        )

    def _initialize_and_run_controller(self, **settings: Any) -> Any:
        return super()._initialize_and_run_controller(
            **{**settings, "failure_policy": self._failures, "scaling_policy": self._sizes}
        )


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

    def __init__(self, job: Job, environment: Environment) -> None:
        self.error: BaseException | None = None
        self._job, self._environment = job, environment
        self._thread = threading.Thread(target=self._run, name="ray-train", daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float) -> bool:
        """Whether it has ended by then."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            with tempfile.TemporaryDirectory(prefix="muster-ray-train-") as folder:
                Trainer(self._job, self._environment, folder).fit()
        except BaseException as error:
            self.error = error


def fit(job: Job, environment: Environment, every: Callable[[], None], poll_s: float) -> None:
    """Trains to the end, calling ``every`` each ``poll_s`` seconds. Raises the first cause of a failure."""
    running = Fit(job, environment)
    while not running.wait(poll_s):
        every()
    every()
    if running.error is not None:
        run = open_storage(job.storage).child(job.recipe.name)
        raise explained(cause_of(running.error), run).as_error() from running.error
