"""The kinds of clusters: a job is rendered, submitted, followed and cancelled.

Imports neither torch nor Ray, and nothing of the trainer: it gets plain values.
"""

from __future__ import annotations

import importlib

from cluster.job import Cluster, ClusterError, ClusterJob

KINDS = {
    "ray": "cluster.ray:Ray",
    "slurm": "cluster.slurm:Slurm",
    "kubernetes": "cluster.kubernetes:Kubernetes",
}


def cluster_of(kind: str) -> Cluster:
    """The kind's code, imported on first use; ClusterError with the names that there are."""
    if kind not in KINDS:
        raise ClusterError(f"{kind!r} is no kind of cluster; there are: {', '.join(KINDS)}")
    module, _, name = KINDS[kind].partition(":")
    made: Cluster = getattr(importlib.import_module(module), name)()
    return made


__all__ = ["KINDS", "Cluster", "ClusterError", "ClusterJob", "cluster_of"]
