"""The kinds of clusters: a job is rendered, submitted, followed and cancelled.

Imports neither torch nor Ray, and nothing of the trainer: it gets plain values.
"""

from __future__ import annotations

import importlib
from typing import NamedTuple, cast

from cluster.job import Cluster, ClusterError, ClusterJob, Renderer


class Kind(NamedTuple):
    """The facts of a kind of cluster that are known without importing its code.

    ``code``: the `Cluster`, or `Renderer`, as ``module:class``. ``shares_folder``: its machines have the working folder
    of the machine that submits. ``stores_recipe``: its jobs read their recipe from the storage; otherwise the recipe is
    sent inside the job. ``restarts``: the setting that limits how often the cluster itself starts a failed job again,
    with the same command; None if it never does. ``workers_per_node``: the function of a job that returns its workers
    per node (or pod), as ``module:function``; '' if that depends on the cluster. ``scatters``: the setting of the
    workers per pod, where pods may be placed on any machines; '' otherwise. ``by_hand``: a sentence that says how a
    rendered job is submitted, if muster does not do it."""

    code: str
    shares_folder: bool = False
    stores_recipe: bool = False
    restarts: str | None = None
    workers_per_node: str = ""
    scatters: str = ""
    by_hand: str = ""


KINDS = {
    "ray": Kind("cluster.ray:Ray"),
    "slurm": Kind(
        "cluster.slurm:Slurm",
        shares_folder=True,
        stores_recipe=True,
        workers_per_node="cluster.slurm:workers_per_node",
    ),
    "kubernetes": Kind(
        "cluster.kubernetes:Kubernetes",
        restarts="retries",
        workers_per_node="cluster.kubernetes.manifests:workers_per_pod",
        scatters="cluster.kubernetes.workers_per_pod",
    ),
    "skypilot": Kind(
        "cluster.skypilot:SkyPilot",
        workers_per_node="cluster.skypilot:workers_per_node",
        by_hand=(
            "muster only writes a task for SkyPilot: `muster render RECIPE --on skypilot > task.yaml`; launch it with "
            "`sky launch task.yaml`, or with `sky jobs launch task.yaml`, which starts it again on other machines"
        ),
    ),
}


def renderer_of(kind: str) -> Renderer:
    """Imports the kind's code on first use. Raises ClusterError for an unknown kind."""
    if kind not in KINDS:
        raise ClusterError(f"{kind!r} is no kind of cluster; there are: {', '.join(KINDS)}")
    module, _, name = KINDS[kind].code.partition(":")
    made: Renderer = getattr(importlib.import_module(module), name)()
    return made


def cluster_of(kind: str) -> Cluster:
    """Returns the kind's code to submit and follow jobs with. Raises ClusterError for an unknown kind, and for one
    whose jobs are only rendered."""
    made = renderer_of(kind)
    if KINDS[kind].by_hand:
        raise ClusterError(KINDS[kind].by_hand)
    return cast(Cluster, made)


def workers_per_node(kind: str, job: ClusterJob) -> int | None:
    """Returns the number of the job's workers on each node, or in each pod; None if the job does not decide it. Raises
    ClusterError for settings that exclude each other."""
    if not KINDS[kind].workers_per_node:
        return None
    module, _, name = KINDS[kind].workers_per_node.partition(":")
    found: int = getattr(importlib.import_module(module), name)(job)
    return found


__all__ = [
    "KINDS",
    "Cluster",
    "ClusterError",
    "ClusterJob",
    "Kind",
    "Renderer",
    "cluster_of",
    "renderer_of",
    "workers_per_node",
]
