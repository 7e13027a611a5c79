"""The kinds of clusters: a job is rendered, submitted, followed and cancelled.

Imports neither torch nor Ray, and nothing of the trainer: it gets plain values.
"""

from __future__ import annotations

import importlib
from typing import NamedTuple

from cluster.job import Cluster, ClusterError, ClusterJob


class Kind(NamedTuple):
    """The facts of a kind of cluster that are known without importing its code.

    ``code``: the `Cluster` as ``module:class``. ``shares_folder``: its machines have the working folder of the machine
    that submits. ``stores_recipe``: its jobs read their recipe from the storage; otherwise the recipe is sent inside
    the job. ``restarts``: the setting that limits how often the cluster itself starts a failed job again, with the same
    command; None if it never does."""

    code: str
    shares_folder: bool = False
    stores_recipe: bool = False
    restarts: str | None = None


KINDS = {
    "ray": Kind("cluster.ray:Ray"),
    "slurm": Kind("cluster.slurm:Slurm", shares_folder=True, stores_recipe=True),
    "kubernetes": Kind("cluster.kubernetes:Kubernetes", restarts="retries"),
}


def cluster_of(kind: str) -> Cluster:
    """Imports the kind's code on first use. Raises ClusterError for an unknown kind."""
    if kind not in KINDS:
        raise ClusterError(f"{kind!r} is no kind of cluster; there are: {', '.join(KINDS)}")
    module, _, name = KINDS[kind].code.partition(":")
    made: Cluster = getattr(importlib.import_module(module), name)()
    return made


__all__ = ["KINDS", "Cluster", "ClusterError", "ClusterJob", "Kind", "cluster_of"]
