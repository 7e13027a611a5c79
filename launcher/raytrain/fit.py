"""An attempt as one ``fit()`` of Ray Train: a fixed number of workers and no restarts. The driver decides the rest."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

import ray
from ray.train import get_context
from ray.train.backend import Backend, BackendConfig
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from launcher.attempt import AttemptFailed, ResizeRequested, run_packed
from launcher.raytrain.environment import Environment
from launcher.raytrain.failures import first_cause, first_line, last_error, unwrapped
from trainer.errors import InputError
from trainer.recipe import ResourcesSection
from trainer.run.failure import Failure
from trainer.worker.job import Job


class Worker:
    """The function that Ray Train calls on each worker. It is pickled, with the environment inside. The job is unpacked
    in that environment, where its plug-ins are found."""

    def __init__(self, job: Job, environment: Environment) -> None:
        self._job, self._environment = job.packed(), environment

    def __call__(self) -> None:
        self._environment.apply()
        context = get_context()
        run_packed(self._job, context.get_world_rank(), context.get_world_size())


Outcome = ResizeRequested | AttemptFailed


def fit(
    job: Job,
    workers: int,
    environment: Environment,
    variables: Mapping[str, str],
    explained: Callable[[Outcome], Outcome] = lambda outcome: outcome,
) -> None:
    """Trains an attempt. Raises ResizeRequested or AttemptFailed, as ``explained``. ``variables`` are set when a
    worker's process starts, before Ray Train imports torch there. The folder is Ray Train's scratch space on the
    driver's host: checkpoints do not go through it."""
    with tempfile.TemporaryDirectory(prefix="muster-ray-train-") as folder:
        no_restarts = FailureConfig(max_failures=0, controller_failure_limit=0)
        run: Any = RunConfig(
            name=job.recipe.name,
            storage_path=folder,
            failure_config=no_restarts,
            worker_runtime_env={"env_vars": dict(variables)} if variables else None,
        )
        trainer = DataParallelTrainer(
            Worker(job, environment),
            backend_config=GroupConfig(),
            scaling_config=scaling(job.recipe.resources, workers),
            run_config=run,
        )
        try:
            trainer.fit()
        except Exception as error:
            raise explained(outcome_of(error)) from error


def scaling(resources: ResourcesSection, workers: int) -> ScalingConfig:
    """Raises InputError if this version of Ray Train cannot place workers by labels."""
    labels: dict[str, Any] = {"label_selector": dict(resources.labels)} if resources.labels else {}
    if labels and "label_selector" not in signature(ScalingConfig).parameters:
        raise InputError(
            f"resources.labels: Ray Train {ray.__version__} cannot place workers by the labels of nodes; leave them "
            "out, or install a newer Ray on all nodes"
        )
    return ScalingConfig(
        num_workers=workers,
        use_gpu=resources.gpus_per_worker > 0,
        resources_per_worker={"CPU": resources.cpus_per_worker, "GPU": resources.gpus_per_worker},
        placement_strategy=resources.placement.upper(),
        accelerator_type=resources.accelerator_type,
        **labels,
    )


def outcome_of(error: BaseException) -> Outcome:
    """Returns what the error of a ``fit()`` means."""
    if isinstance(error, WorkerGroupError) and error.worker_failures:
        failures: Mapping[int, BaseException] = {r: unwrapped(e) for r, e in error.worker_failures.items()}
        resize = next((e for e in failures.values() if isinstance(e, ResizeRequested)), None)
        return resize or AttemptFailed(first_cause(failures))
    cause = error.controller_failure if isinstance(error, ControllerError) else error
    message = first_line(cause)
    if type(cause).__name__ == "WorkerGroupStartupFailedError":
        message = f"a worker ended while it was started: {last_error(str(cause))}"
    if type(cause).__name__ == "WorkerGroupStartupTimeoutError":
        message = (
            "the cluster did not give the workers their CPUs and GPUs in time: other jobs hold them, or no single node "
            "has enough; see `ray status`"
        )
    return AttemptFailed(Failure(message), starting=True)


class GroupConfig(BackendConfig):
    """Tells each worker where its process group meets, as torchrun does; the worker joins it itself. Ray Train's own
    configuration for torch imports torch in the driver."""

    @property
    def backend_cls(self) -> type[MeetingPoint]:
        return MeetingPoint


class MeetingPoint(Backend):
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        address, port = worker_group.execute_single(0, address_and_port)
        worker_group.execute(meet_at, address, port)


def address_and_port() -> tuple[str, int]:
    """On rank 0: returns this node's address, and a port that is free now."""
    address = ray.util.get_node_ip_address()
    with socket.create_server((address, 0)) as server:
        return address, int(server.getsockname()[1])


def meet_at(address: str, port: int) -> None:
    context = get_context()
    os.environ |= {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "RANK": str(context.get_world_rank()),
        "WORLD_SIZE": str(context.get_world_size()),
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
    }
