"""The training itself as Ray Train runs it: the function of each worker, what a failure means, and the wait for it."""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ray.train.torch import TorchConfig
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError
from ray.train.v2.torch.torch_trainer import TorchTrainer

from launcher.causes import Cause, Failure, first_cause
from launcher.environment import Environment
from launcher.restarts import Fault, in_a_row, is_hopeless
from trainer.layout import EVENTS, METRICS
from trainer.recipe import ResourcesSection
from trainer.storage import Storage, open_storage
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
        except Exception as error:
            trace = traceback.format_exc()
            raise Failure.of(error, time.time(), rank, os.uname().nodename, trace) from None


def _train(job: Job, rank: int) -> None:
    from trainer.errors import Interrupted
    from trainer.watch import StopWatch
    from trainer.worker import train

    run = open_storage(job.storage).child(job.recipe.name)
    with StopWatch(run, job.driver, enabled=rank == 0) as watch:
        try:
            train(job, watch.stop_requested)
        except Interrupted as stopped:
            log.info("%s", stopped)


class FailurePolicy(DefaultFailurePolicy):
    """Ray Train's own policy, but what would fail again the same way ends the run: a fatal cause at once, the same
    error at the same step the third time. Every failure is written to the run's events with its first cause. Runs in
    Ray Train's controller."""

    def __init__(self, config: FailureConfig, job: Job, environment: Environment) -> None:
        super().__init__(config)
        self._job, self._environment = job, environment
        self._faults: list[Fault] = []

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        self._environment.apply()
        cause = self._cause(training_failed_error)
        self._faults.append(Fault(self._step(), cause.message))
        hopeless = cause.fatal or is_hopeless(self._faults)
        decision = FailureDecision.RAISE if hopeless else super().make_decision(training_failed_error)
        try:
            self._record(cause, decision)
        except Exception:
            log.exception("the failure could not be written to the run's events")
        return decision

    def _cause(self, error: BaseException) -> Cause:
        try:
            return explained(cause_of(error), self._run())
        except Exception:
            log.exception("the run's events could not be read")
            return cause_of(error)

    def _run(self) -> Storage:
        return open_storage(self._job.storage, deadline_s=20).child(self._job.recipe.name)

    def _step(self) -> int | None:
        """The step that the run's metrics had reached, 0 before the first; None when the storage does not tell."""
        from trainer.reporter import rows_backwards

        try:
            return next((int(row["step"]) for row in rows_backwards(self._run(), METRICS) if "loss" in row), 0)
        except Exception:
            log.exception("the step of the failure could not be read")
            return None

    def _record(self, cause: Cause, decision: FailureDecision) -> None:
        from trainer.checkpoint import read_claims
        from trainer.reporter import Events

        run, fault, times = self._run(), self._faults[-1], in_a_row(self._faults)
        told = f"{cause.message} ({times} times in a row at step {fault.step})" if times > 1 else cause.message
        events = Events(run, read_claims(run).attempt, f"driver{self._job.driver}-controller")
        retried = decision == FailureDecision.RETRY
        events.emit("failure", cause=told, rank=cause.rank, host=cause.host, step=fault.step, retried=retried)
        events.close()


def cause_of(error: BaseException) -> Cause:
    if isinstance(error, WorkerGroupError) and error.worker_failures:
        return first_cause(error.worker_failures)
    if isinstance(error, ControllerError):
        return Cause(_controller_message(error.controller_failure))
    return Cause(f"{type(error).__name__}: {error}")


def explained(cause: Cause, run: Storage) -> Cause:
    """A group whose ranks were ended because one held them up failed of that: the newest attempt's events say so."""
    from trainer.checkpoint import read_claims
    from trainer.reporter import rows_backwards

    if not cause.by_another:
        return cause
    attempt = read_claims(run).attempt
    rows = (row for row in rows_backwards(run, EVENTS) if row.get("attempt") == attempt and row["event"] == "hang")
    hang = next(rows, None)
    return cause if hang is None else replace(cause, message=hang["cause"])


def _controller_message(failure: BaseException) -> str:
    name = type(failure).__name__
    if name == "WorkerGroupStartupTimeoutError":
        return (
            f"the cluster did not give {getattr(failure, 'num_workers', 'the')} workers their CPUs and GPUs in time: "
            "other jobs hold them, or no single node has enough; see `ray status`"
        )
    return f"{name}: {failure}"


class Trainer(TorchTrainer):
    """TorchTrainer with this failure policy in the place of its default one, which has no hook of its own."""

    def __init__(self, job: Job, environment: Environment, folder: str) -> None:
        resources = job.recipe.resources
        self._policy = FailurePolicy(_failure_config(resources), job, environment)
        super().__init__(
            Worker(job, environment),
            torch_config=TorchConfig(
                backend=backend_of(gpu=resources.gpus_per_worker > 0), timeout_s=COLLECTIVE_TIMEOUT_S
            ),
            scaling_config=_scaling(resources),
            run_config=RunConfig(name=job.recipe.name, storage_path=folder, failure_config=_failure_config(resources)),
        )

    def _initialize_and_run_controller(self, **settings: Any) -> Any:
        return super()._initialize_and_run_controller(**{**settings, "failure_policy": self._policy})


def _failure_config(resources: ResourcesSection) -> FailureConfig:
    return FailureConfig(max_failures=resources.max_failures, controller_failure_limit=START_ATTEMPTS - 1)


def _scaling(resources: ResourcesSection) -> ScalingConfig:
    elastic = resources.min_workers != resources.max_workers
    return ScalingConfig(
        num_workers=(resources.min_workers, resources.max_workers) if elastic else resources.max_workers,
        use_gpu=resources.gpus_per_worker > 0,
        resources_per_worker={"CPU": resources.cpus_per_worker, "GPU": resources.gpus_per_worker},
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
