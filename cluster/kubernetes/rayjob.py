"""A run as a RayJob of KubeRay's operator: elastic, with a head that does not train."""

from __future__ import annotations

import re
import shlex

from cluster.job import ClusterError, ClusterJob
from cluster.job_shape import nodes_for
from cluster.kubernetes.kind import JobKind
from cluster.kubernetes.manifests import loaded, set_metadata
from cluster.kubernetes.names import RAYJOB_LENGTH
from cluster.kubernetes.patch import Fields
from cluster.kubernetes.pods import (
    MAIN,
    RECIPE_PATH,
    add_recipe,
    fill,
    patch_head,
    patch_submitter,
    patch_workers,
    place,
    set_worker_resources,
    shared_memory,
)
from cluster.kubernetes.reading import FAILED, INTERRUPTED, SUCCEEDED, USAGE, Reading
from cluster.ray_nodes import NODE_SETTINGS

_WORD = re.compile(r"[A-Za-z0-9_./:=,@%+-]+")


def manifest(job: ClusterJob) -> Fields:
    """Returns the RayJob. Elastic bounds become the bounds of the worker group.

    KubeRay submits the job when all ``replicas`` are running, so an elastic group starts with its minimum, and Ray's
    autoscaler requests the rest. Kueue admits no job that has an autoscaler: in a queue the group has its full size and
    shrinks only by the loss of pods.
    """
    settings = job.settings
    made = loaded("rayjob.yaml")
    name = set_metadata(made, job, RAYJOB_LENGTH)
    spec, cluster = made["spec"], made["spec"]["rayClusterSpec"]
    spec["entrypoint"] = shlex.join(["muster", *words(job), RECIPE_PATH])
    spec["backoffLimit"] = settings["retries"]
    spec["submitterConfig"]["backoffLimit"] = max(2, settings["retries"])
    if settings.get("ttl_s") is not None:
        spec["ttlSecondsAfterFinished"] = settings["ttl_s"]
    if settings.get("deadline_s"):
        spec["activeDeadlineSeconds"] = settings["deadline_s"]
    environment = dict(NODE_SETTINGS) | {"MUSTER_RAYJOB": name}
    submitter = spec["submitterPodTemplate"]["spec"]
    submitter["containers"][0]["image"] = settings.get("image") or submitter["containers"][0]["image"]
    if settings.get("service_account"):
        submitter["serviceAccountName"] = settings["service_account"]
    if settings.get("ray_auth", "token") == "disabled":
        cluster.pop("authOptions")
        environment["RAY_AUTH_MODE"] = "disabled"
        submitter["containers"][0]["env"] = [{"name": "RAY_AUTH_MODE", "value": "disabled"}]
    head, workers = cluster["headGroupSpec"], cluster["workerGroupSpecs"][0]
    # Between SIGTERM and SIGKILL for a driver that is stopped through Ray: the time in which a checkpoint is committed.
    fill(head["template"], job, environment | {"RAY_JOB_STOP_WAIT_TIME_S": str(settings["grace_s"])})
    add_recipe(head["template"], job)
    fill(workers["template"], job, environment)
    place(workers["template"]["spec"], job)
    set_worker_resources(workers["template"]["spec"]["containers"][0], job)
    for group in (head, workers):
        group["rayStartParams"]["object-store-memory"] = str(shared_memory(job) // 2)
    head["template"] = patch_head(head["template"], job)
    workers["template"] = patch_workers(workers["template"], job)
    spec["submitterPodTemplate"] = patch_submitter(spec["submitterPodTemplate"], job)

    low, high = (nodes_for(job, places, _places_per_pod(job)) for places in job.places)
    elastic = low < high and not settings.get("queue")
    workers |= {"replicas": low if elastic else high, "minReplicas": low, "maxReplicas": high}
    cluster["enableInTreeAutoscaling"] = elastic
    if not elastic:
        cluster.pop("autoscalerOptions")
    return made


def _places_per_pod(job: ClusterJob) -> int:
    per_pod: int = job.settings["workers_per_pod"]
    if job.servers and job.places_per_server > per_pod:
        raise ClusterError(
            f"a vLLM server takes {job.gpus_per_server} GPUs (rollout.vllm.tensor_parallel), and a pod has "
            f"{per_pod * job.gpus_per_worker}: set cluster.kubernetes.workers_per_pod to {job.places_per_server} or "
            "more"
        )
    return per_pod


def words(job: ClusterJob) -> list[str]:
    """Returns the words of muster's command. They go through two shells (the submitter's and Ray's), so none may need
    quotes."""
    for word in job.command:
        if not _WORD.fullmatch(word):
            raise ClusterError(f"{word!r} cannot stand in a RayJob's entrypoint, which goes through two shells")
    return list(job.command)


_ENDED = frozenset({"Complete", "Failed", "ValidationFailed"})
_EXIT_CODE = re.compile(r"entrypoint command failed with exit code (-?\d+)")
"""What Ray's job supervisor writes as the job's message."""


def read(made: Fields) -> Reading:
    status = made.get("status") or {}
    state = status.get("jobDeploymentStatus") or "Pending"
    message = status.get("message") or ""
    if state not in _ENDED:
        return Reading(state, None, message)
    if state == "ValidationFailed":
        return Reading(state, USAGE, message)
    job, reason = status.get("jobStatus"), status.get("reason", "")
    if job == "SUCCEEDED":
        return Reading(state, SUCCEEDED)
    if job == "STOPPED":
        return Reading(state, INTERRUPTED, message)
    # Ray's message ends with the job's last lines, which were passed on already.
    detail = f"{reason}: {message.partition(', last available logs')[0]}".strip(": ")
    if reason == "DeadlineExceeded":
        return Reading(state, INTERRUPTED, detail)
    found = _EXIT_CODE.search(message)
    code = int(found[1]) if found else FAILED
    return Reading(state, code if code in (1, 2, 3) else FAILED, detail)


def selectors(name: str, made: Fields) -> tuple[str | None, str]:
    ray_cluster = (made.get("status") or {}).get("rayClusterName")
    return (f"ray.io/cluster={ray_cluster}" if ray_cluster else None), f"job-name={name}"


RAYJOB = JobKind(lambda job: [manifest(job)], read, selectors, MAIN)
