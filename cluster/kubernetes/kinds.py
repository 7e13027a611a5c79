"""The kinds of jobs that a run can be on Kubernetes: one file and one row each."""

from __future__ import annotations

from cluster.job import ClusterJob
from cluster.kubernetes.jobset import JOBSET
from cluster.kubernetes.kind import JobKind
from cluster.kubernetes.patch import Fields
from cluster.kubernetes.rayjob import RAYJOB
from cluster.kubernetes.trainjob import TRAINJOB

DEFAULT = "rayjob"
KINDS: dict[str, JobKind] = {DEFAULT: RAYJOB, "jobset": JOBSET, "trainjob": TRAINJOB}


def manifests(job: ClusterJob) -> list[Fields]:
    """Returns the objects of the job in the order of their creation, the job itself last. Raises ClusterError for what
    a user can fix: settings that exclude each other, an invalid amount or patch, a recipe that is too large."""
    return KINDS[job.settings.get("kind", DEFAULT)].manifests(job)
