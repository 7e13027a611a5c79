"""A ``map`` over Ray tasks: prepares data on a cluster, before the training workers or at the same time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from launcher.raytrain.environment import Environment
from trainer.data.prepare.executor import Map
from trainer.errors import Interrupted
from trainer.recipe import ResourcesSection

POLL_S = 1.0


def ray_map(
    environment: Environment,
    beside: ResourcesSection | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Map:
    """Yields results in the jobs' order; a single job runs in this process, where it needs no worker.

    Each task takes a CPU, and as many are in flight as the cluster has CPUs. ``beside``: the tasks run next to training
    workers and take none of Ray's CPUs, so that neither waits for the other; as many are in flight as the workers leave
    over, at least one. Raises Interrupted once ``stopped()``; tasks in flight are then cancelled, as they are when the
    iterator is closed.
    """

    def run(task: Callable[[Any], Any], jobs: Sequence[Any]) -> Iterator[Any]:
        if len(jobs) <= 1:
            yield from map(task, jobs)
            return
        import ray

        cpus = int(ray.cluster_resources().get("CPU", 1))
        ahead = max(2, cpus) if beside is None else max(1, cpus - beside.max_workers * beside.cpus_per_worker)
        call = ray.remote(num_cpus=0 if beside else 1, max_retries=3, scheduling_strategy="SPREAD")(_run)
        # As arguments, both stay in the object store; a closure would be kept by the cluster's control store.
        shared, variables = ray.put(task), ray.put(environment)
        pending: list[Any] = []
        try:
            for job in jobs:
                pending.append(call.remote(variables, shared, job))
                if len(pending) >= ahead:
                    yield _result(pending.pop(0), stopped)
            while pending:
                yield _result(pending.pop(0), stopped)
        finally:
            for reference in pending:
                ray.cancel(reference, force=True)

    return run


def _run(environment: Environment, task: Callable[[Any], Any], job: Any) -> Any:
    environment.apply()
    return task(job)


def _result(reference: Any, stopped: Callable[[], bool]) -> Any:
    """Returns the task's result, or raises its own exception instead of Ray's wrapper."""
    import ray

    while not ray.wait([reference], timeout=POLL_S)[0]:
        if stopped():
            ray.cancel(reference, force=True)
            raise Interrupted("stopped while data was being prepared")
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        raise (cause if isinstance(cause, Exception) else error) from None
