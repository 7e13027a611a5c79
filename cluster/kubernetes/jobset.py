"""A run as a JobSet: torchrun in an indexed Job, without Ray and of a fixed size."""

from __future__ import annotations

import shlex

from cluster.job import ClusterError, ClusterJob
from cluster.job_shape import refuse_servers
from cluster.kubernetes.kind import JobKind
from cluster.kubernetes.manifests import loaded, set_metadata
from cluster.kubernetes.names import JOBSET_LENGTH
from cluster.kubernetes.patch import Fields
from cluster.kubernetes.pods import (
    MAIN,
    RECIPE_PATH,
    add_recipe,
    fill,
    patch_workers,
    place,
    set_worker_resources,
)
from cluster.kubernetes.reading import Reading, of_conditions

RENDEZVOUS_PORT = 29400


def manifest(job: ClusterJob) -> Fields:
    """Returns the JobSet."""
    made = loaded("jobset.yaml")
    name = set_metadata(made, job, JOBSET_LENGTH)
    fill_spec(made["spec"], job, name)
    if job.settings.get("deadline_s"):
        made["spec"]["replicatedJobs"][0]["template"]["spec"]["activeDeadlineSeconds"] = job.settings["deadline_s"]
        # First, so that the attempts that are left do not start the run again.
        rule = {"name": "deadline", "action": "FailJobSet", "onJobFailureReasons": ["DeadlineExceeded"]}
        made["spec"]["failurePolicy"]["rules"].insert(0, rule)
    return made


def fill_spec(spec: Fields, job: ClusterJob, name: str) -> int:
    """Fills in the spec of a JobSet ``name``, and returns its number of pods. The processes find each other through the
    first pod."""
    settings = job.settings
    nodes = _nodes(job)
    if settings.get("ttl_s") is not None:
        spec["ttlSecondsAfterFinished"] = settings["ttl_s"]
    spec["failurePolicy"]["maxRestarts"] = settings["retries"]
    spec["network"]["subdomain"] = name
    group = spec["replicatedJobs"][0]
    indexed = group["template"]["spec"]
    indexed["completions"] = indexed["parallelism"] = nodes
    template = indexed["template"]
    fill(template, job, {"OMP_NUM_THREADS": str(max(1, job.cpus_per_worker))})
    add_recipe(template, job)
    place(template["spec"], job)
    container = template["spec"]["containers"][0]
    set_worker_resources(container, job)
    first = f"{name}-{group['name']}-0-0.{name}"
    container["args"] = [
        *("--nnodes", str(nodes), "--nproc-per-node", str(settings["workers_per_pod"]), "--rdzv-id", name),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{first}:{RENDEZVOUS_PORT}"),
        *("-m", "trainer", RECIPE_PATH),
    ]
    indexed["template"] = patch_workers(template, job)
    return nodes


def _nodes(job: ClusterJob) -> int:
    (low, high), per_pod = job.workers, job.settings["workers_per_pod"]
    kind = job.settings.get("kind")
    refuse_servers(job, f"cluster.kubernetes.kind: {kind}")
    if low != high:
        raise ClusterError(
            f"resources.workers is [{low}, {high}], and cluster.kubernetes.kind: {kind} runs torchrun with a fixed "
            f"number of workers; set resources.workers={high}, or kind: rayjob"
        )
    if high % per_pod:
        raise ClusterError(
            f"{high} workers do not fill pods of {per_pod} (cluster.kubernetes.workers_per_pod); with kind: {kind} "
            "every pod has the same number of workers"
        )
    if list(job.command) != ["run"]:
        raise ClusterError(f"kind: {kind} can only run a recipe, not {shlex.join(job.command)!r}; use kind: rayjob")
    if job.settings.get("head_pod"):
        raise ClusterError(f"kind: {kind} has no head for cluster.kubernetes.head_pod; move it to `pod`, or remove it")
    return int(high // per_pod)


def read(made: Fields) -> Reading:
    # The only rule that fails a JobSet is the deadline's.
    return of_conditions(made, "Completed", "FailJobSetFailurePolicyAction", "replicatedJobsStatus")


def selectors(name: str, made: Fields) -> tuple[str | None, str]:
    mine = f"jobset.sigs.k8s.io/jobset-name={name}"
    return mine, f"{mine},batch.kubernetes.io/job-completion-index=0"


JOBSET = JobKind(lambda job: [manifest(job)], read, selectors, MAIN)
