"""Ray Train's controller and group of workers, with less to start.

Ray Train starts an actor for its controller, one that guards the placement group, one for barriers that this program
never enters, and the workers after all of them; each is a process that imports for seconds. Here the controller runs in
the driver, without which there is no run anyway and with which Ray frees all that its job holds; the workers import
what they need while the driver checks the inputs, and get their function when there is a job
(`launcher.raytrain.handoff`).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2._internal.execution.worker_group.execution_group import ReplicaGroup
from ray.train.v2._internal.execution.worker_group.state import WorkerGroupState, _shutdown_workers
from ray.train.v2._internal.util import ObjectRefWrapper, time_monotonic

from launcher.raytrain.environment import Environment
from launcher.raytrain.handoff import JobHandoff
from trainer.fast_imports import load_libraries

if TYPE_CHECKING:
    from collections.abc import Callable

    from trainer.worker.job import Job

COLLECTIVE_TIMEOUT_S = 1800
LEAVE_S, ANSWER_S = 30.0, 5.0


class State(WorkerGroupState):
    """A group's, without the actor for barriers."""

    def shutdown(self) -> None:
        _shutdown_workers(self.workers)
        self.placement_group_handle.shutdown()


class PrestartedGroup(WorkerGroup):
    """A group of workers that waits for the job. `controller_for` sets ``order``, ``environment`` and ``function`` (the
    worker's function of a job)."""

    order: JobHandoff
    environment: Environment
    function: Callable[[Job], Callable[[], None]]

    def _start(self) -> None:
        try:
            super()._start()  # type: ignore[no-untyped-call]
        except BaseException:
            if self._worker_group_state is not None:  # Ray Train would forget it, and what it holds
                self._worker_group_state.shutdown()
            raise

    def _start_impl(self, worker_group_state_builder: Any) -> None:
        context, builder = self._worker_group_context, worker_group_state_builder
        self._check_cluster_resources_and_raise_if_insufficient(context.resources_per_worker, context.num_workers)
        self.order.stage = f"starting {context.num_workers} worker" + ("" if context.num_workers == 1 else "s")
        for callback in self._callbacks:
            callback.before_worker_group_start(context)
        handle = self._create_placement_group(self._train_run_context.scaling_config, context)
        if not handle.wait(self._worker_group_start_timeout_s):
            handle.shutdown()
            raise WorkerGroupStartupTimeoutError(num_workers=context.num_workers)
        builder.with_placement_group_handle(handle)
        workers = self._create_workers(context.num_workers, handle.placement_group, context.resources_per_worker)
        builder.with_workers(workers)
        callbacks: list[Any] = self._replica_group_callbacks
        self._replica_groups = [ReplicaGroup([worker], context.resources_per_worker, callbacks) for worker in workers]
        # Workers come in the order of their ranks.
        self._worker_rank_to_replica_group_rank = {rank: rank for rank in range(len(workers))}
        try:
            self._begin(workers, handle)
        except RayActorError as error:
            raise WorkerGroupStartupFailedError("a worker died while it was being started") from error
        for callback in self._callbacks:
            callback.after_worker_group_training_start(self)

    def _begin(self, workers: list[Any], handle: Any) -> None:
        no_barriers: Any = None
        self._init_train_context(workers, no_barriers)  # before the imports, which may look for GPUs: it says which
        imports = [worker.execute_async(preload, self.environment) for worker in workers]
        self._worker_group_state = State(
            start_time=time_monotonic(), placement_group_handle=handle, workers=workers, sync_actor=no_barriers
        )
        ray.wait(imports, num_returns=len(imports), fetch_local=False)  # what failed there, the training says itself
        for callback in self._callbacks:
            callback.after_worker_group_start(self)
        self.order.stage = "checking inputs and preparing data"
        job = self.order.wait(self._check_alive)
        reference = ObjectRefWrapper(type(self).function(job))
        ray.get([worker.actor.run_train_fn.remote(reference) for worker in workers])
        self.order.stage = "loading the model and making the first step"

    def _check_alive(self) -> None:
        """Raises RayActorError for a worker that has died while it waited."""
        try:
            answers: Any = self.execute_async(os.getpid)
            ray.get(answers, timeout=ANSWER_S)
        except GetTimeoutError:
            return

    def _init_train_context_on_workers(self, workers: list[Any], sync_actor: Any, train_context_args: Any) -> None:
        ray.get(
            [
                worker.actor.init_train_context.remote(
                    train_run_context=self._train_run_context,
                    distributed_context=worker.distributed_context,
                    synchronization_actor=sync_actor,
                    storage_context=self._storage_context,
                    worker_callbacks=self._worker_callbacks_to_propagate,
                    controller_actor=None,
                    **{name: values[i] for name, values in train_context_args.items()},
                )
                for i, worker in enumerate(workers)
            ]
        )

    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: Any) -> Any:
        """Nothing of its own, so that processes that Ray has ready are of use. Ray Train would hand on its settings,
        which are the controller's."""
        return custom_runtime_env

    def shutdown(self) -> None:
        self.order.lost()
        super().shutdown()  # type: ignore[no-untyped-call]


def controller_for(
    order: JobHandoff, environment: Environment, function: Callable[[Job], Callable[[], None]]
) -> type[TrainController]:
    """Ray Train's controller over such groups; it ends when the driver leaves."""
    names = {"order": order, "environment": environment, "function": staticmethod(function)}

    class Controller(TrainController):
        worker_group_cls: Any = type("WorkersGroup", (PrestartedGroup,), names)

        async def _run_control_loop_iteration(self) -> None:
            order.check()
            await super()._run_control_loop_iteration()  # type: ignore[no-untyped-call]

    return Controller


def preload(environment: Environment) -> None:
    """On a worker: imports what training needs. The environment comes first, since libraries read it as they are
    imported."""
    environment.apply()
    load_libraries()
    import trainer.worker.attempt  # noqa: F401


class GroupConfig(BackendConfig):
    """torch's process group, as Ray Train's TorchConfig makes it, which would have the driver import torch first."""

    def __init__(self, *, gpu: bool) -> None:
        self.gpu = gpu

    @property
    def backend_cls(self) -> type[ProcessGroup]:
        return ProcessGroup


class ProcessGroup(Backend):
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        address, port = worker_group.execute_single(0, get_address_and_port)
        size = len(worker_group)
        ray.get(
            [
                worker_group.execute_single_async(i, _join, backend_config.gpu, address, port, i, size)
                for i in range(size)
            ]
        )

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        try:
            ray.get(worker_group.execute_async(_leave, len(worker_group) > 1), timeout=LEAVE_S)
        except GetTimeoutError:
            return


def _join(gpu: bool, address: str, port: int, rank: int, size: int) -> None:
    from ray.train.torch import config as of_ray

    from trainer.distributed.world import COLLECTIVE_TIMEOUT, LOOPBACK, backend_of, loopback_store, stay_on_loopback

    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    of_ray._set_torch_distributed_env_vars()
    if address == LOOPBACK:
        from torch import distributed

        stay_on_loopback()
        store = loopback_store(port, rank, size)
        backend = backend_of(gpu=gpu)
        distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=COLLECTIVE_TIMEOUT)
        return
    of_ray._setup_torch_process_group(
        backend=backend_of(gpu=gpu),
        world_rank=rank,
        world_size=size,
        init_method="env://",
        timeout_s=COLLECTIVE_TIMEOUT_S,
    )


def _leave(destroy: bool) -> None:
    from ray.train.torch import config as of_ray

    of_ray._shutdown_torch(destroy_process_group=destroy)
