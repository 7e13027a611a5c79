"""Warnings about replicas that would share the nodes of a cluster, before anything is submitted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from cluster import KINDS, ClusterError, ClusterJob, workers_per_node
from trainer.distributed.replica_nodes import placement_warning
from trainer.recipe.strategies import Mesh

if TYPE_CHECKING:
    from trainer.recipe import Recipe


def job_shape(recipe: Recipe, kind: str, **settings: Any) -> ClusterJob:
    """Returns the recipe's job without the recipe itself; ``settings`` replace the recipe's own."""
    resources, rollout = recipe.resources, recipe.rollout
    return ClusterJob(
        name=recipe.name,
        run_uri=recipe.run_uri,
        recipe="",
        workers=(resources.min_workers, resources.max_workers),
        gpus_per_worker=resources.gpus_per_worker,
        cpus_per_worker=resources.cpus_per_worker,
        settings={**getattr(recipe.cluster, kind).model_dump(mode="json"), **settings},
        replicas=recipe.strategy.replicas,
        servers=rollout.servers_beside,
        gpus_per_server=rollout.vllm.tensor_parallel if resources.gpus_per_worker else 0,
    )


def replica_warnings(recipe: Recipe, kind: str | None = None) -> Iterator[str]:
    """Yields a sentence for each kind of cluster on which replicas would share nodes: for ``kind``, or for those that
    the recipe has settings of."""
    if recipe.strategy.replicas == 1:
        return
    for name in [given for given in recipe.cluster.given() if given in KINDS] if kind is None else [kind]:
        try:
            per_node = workers_per_node(name, job_shape(recipe, name))
        except ClusterError:
            continue  # the submission reports it
        if per_node is None:
            continue
        workers = recipe.resources.max_workers
        each, setting = Mesh.of(recipe, workers).ranks_per_replica, KINDS[name].scatters
        if setting and per_node == 1 < each:
            yield (
                f"{setting} is 1, and a replica has {each} workers (strategy.replicas), which may be placed on any "
                f"machines: set it to {each}, or to a divisor of {each} if a machine has fewer GPUs"
            )
        elif text := placement_warning(recipe, workers, per_node):
            yield f"on {name.capitalize()}, {text}"
