"""The interface of the kinds of jobs that a run becomes on Kubernetes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from cluster.job import ClusterJob
from cluster.kubernetes.patch import Fields
from cluster.kubernetes.reading import Reading


@dataclass(frozen=True)
class JobKind:
    """One row of `kinds.KINDS`, which has its name in the recipe and for kubectl.

    ``manifests``: the objects of a job in the order of their creation, the job itself last, all of one name; raises
    ClusterError for what a user can fix. ``beside``: the resources of the objects before it, which are deleted after
    it. ``read``: the state of the job. ``selectors``: of the pods that train (None while they are unknown), and of the
    pod with the run's output, whose container is ``container``; they get the job's name and the job."""

    manifests: Callable[[ClusterJob], list[Fields]]
    read: Callable[[Fields], Reading]
    selectors: Callable[[str, Fields], tuple[str | None, str]]
    container: str
    beside: tuple[str, ...] = ()

    def reading(self, made: Fields) -> Reading:
        """Reads the job as `kubectl get -o json` prints it."""
        found = self.read(made)
        return replace(found, state="Terminating") if made["metadata"].get("deletionTimestamp") else found
