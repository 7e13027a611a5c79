"""A job as a Kubernetes manifest: pure, data in, data out.

The manifests next to this file (`rayjob.yaml`, `jobset.yaml`) are loaded, patched as data and dumped. The
recipe is an annotation of the pod that needs it and is mounted from there: no shell reads it, and Kubernetes' own
``$(NAME)`` is not expanded in it.
"""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import yaml

from cluster.job import ClusterError, ClusterJob
from cluster.kubernetes.names import JOBSET_LENGTH, RAYJOB_LENGTH, fitted
from cluster.kubernetes.quantity import from_bytes, to_bytes
from cluster.ray_nodes import NODE_SETTINGS

Manifest = dict[str, Any]

HERE = Path(__file__).resolve().parent
RECIPE_PATH = "/etc/muster/recipe.yaml"
RECIPE_ANNOTATION = "muster/recipe"
RUN_ANNOTATION = "muster/run-uri"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
RENDEZVOUS_PORT = 29400
RECIPE_BYTES = 252 * 1024
"""Kubernetes takes 256 KiB of annotations per object; the operator and the scheduler add some of their own."""
SHARED_MEMORY_BYTES = 256 * 2**20
"""Least size of /dev/shm: Ray's object store gets half of it, and does not start with less than 75 MB."""

_WORD = re.compile(r"[A-Za-z0-9_./:=,@%+-]+")


def manifest(job: ClusterJob) -> Manifest:
    """Returns the job's manifest, by ``settings["kind"]``. Raises ClusterError for what a user can fix: settings that
    exclude each other, an invalid amount, a recipe that is too large."""
    return jobset(job) if job.settings.get("kind", "rayjob") == "jobset" else rayjob(job)


def rayjob(job: ClusterJob) -> Manifest:
    """Returns a manifest for KubeRay's operator. Elastic bounds become the bounds of the worker group.

    KubeRay submits the job when all ``replicas`` are running, so an elastic group starts with its minimum, and Ray's
    autoscaler requests the rest. Kueue admits no job that has an autoscaler: in a queue the group has its full size and
    shrinks only by the loss of pods.
    """
    settings = job.settings
    made = _loaded("rayjob.yaml")
    name = _metadata(made, job, RAYJOB_LENGTH)
    spec, cluster = made["spec"], made["spec"]["rayClusterSpec"]
    spec["entrypoint"] = shlex.join(["muster", *_words(job), RECIPE_PATH])
    spec["backoffLimit"] = settings["retries"]
    spec["submitterConfig"]["backoffLimit"] = max(2, settings["retries"])
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
    _pod(head["template"], job, environment | {"RAY_JOB_STOP_WAIT_TIME_S": str(settings["grace_s"])})
    _with_recipe(head["template"], job)
    _pod(workers["template"], job, environment)
    _place(workers["template"]["spec"], job)
    _worker_resources(workers["template"]["spec"]["containers"][0], job)
    for group in (head, workers):
        group["rayStartParams"]["object-store-memory"] = str(_shared_memory(job) // 2)

    low, high = (-(-bound // settings["workers_per_pod"]) for bound in job.workers)
    elastic = low < high and not settings.get("queue")
    workers |= {"replicas": low if elastic else high, "minReplicas": low, "maxReplicas": high}
    cluster["enableInTreeAutoscaling"] = elastic
    if not elastic:
        cluster.pop("autoscalerOptions")
    return made


def jobset(job: ClusterJob) -> Manifest:
    """Returns a manifest for JobSet: torchrun in an indexed Job, without Ray and of a fixed size. The processes find
    each other through the first pod."""
    settings = job.settings
    low, high = job.workers
    per_pod = settings["workers_per_pod"]
    if low != high:
        raise ClusterError(
            f"resources.workers is [{low}, {high}], and cluster.kubernetes.kind: jobset runs torchrun with a fixed "
            f"number of workers; set resources.workers={high}, or kind: rayjob"
        )
    if high % per_pod:
        raise ClusterError(
            f"{high} workers do not fill pods of {per_pod} (cluster.kubernetes.workers_per_pod); with kind: jobset "
            "every pod has the same number of workers"
        )
    if _words(job) != ["run"]:
        raise ClusterError(f"kind: jobset can only run a recipe, not {shlex.join(job.command)!r}; use kind: rayjob")
    made = _loaded("jobset.yaml")
    name = _metadata(made, job, JOBSET_LENGTH)
    spec = made["spec"]
    spec["failurePolicy"]["maxRestarts"] = settings["retries"]
    spec["network"]["subdomain"] = name
    group = spec["replicatedJobs"][0]
    indexed = group["template"]["spec"]
    indexed["completions"] = indexed["parallelism"] = nodes = high // per_pod
    _pod(indexed["template"], job, {"OMP_NUM_THREADS": str(max(1, job.cpus_per_worker))})
    _with_recipe(indexed["template"], job)
    _place(indexed["template"]["spec"], job)
    container = indexed["template"]["spec"]["containers"][0]
    _worker_resources(container, job)
    first = f"{name}-{group['name']}-0-0.{name}"
    container["args"] = [
        *("--nnodes", str(nodes), "--nproc-per-node", str(per_pod), "--rdzv-id", name),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{first}:{RENDEZVOUS_PORT}"),
        *("-m", "trainer", RECIPE_PATH),
    ]
    return made


def workers_per_pod(job: ClusterJob) -> int:
    return int(job.settings["workers_per_pod"])


def _loaded(name: str) -> Manifest:
    made: Manifest = yaml.safe_load((HERE / name).read_text(encoding="utf-8"))
    return made


def _metadata(made: Manifest, job: ClusterJob, length: int) -> str:
    metadata, settings = made["metadata"], job.settings
    metadata["name"] = name = fitted(job.name, length)
    if settings.get("namespace"):
        metadata["namespace"] = settings["namespace"]
    metadata["annotations"] = {"muster/run": job.name, RUN_ANNOTATION: job.run_uri}
    if settings.get("queue"):
        metadata["labels"][QUEUE_LABEL] = settings["queue"]
        made["spec"]["suspend"] = True
    return name


def _words(job: ClusterJob) -> list[str]:
    """Returns the words of muster's command. They go through two shells (the submitter's and Ray's), so none may need
    quotes."""
    for word in job.command:
        if not _WORD.fullmatch(word):
            raise ClusterError(f"{word!r} cannot stand in a RayJob's entrypoint, which goes through two shells")
    return list(job.command)


def _pod(template: Manifest, job: ClusterJob, environment: dict[str, str]) -> None:
    """Fills in the settings of every pod of the run: image, credentials by reference, environment, shared memory, grace
    period."""
    settings, spec = job.settings, template["spec"]
    container = spec["containers"][0]
    container["image"] = settings.get("image") or container["image"]
    # `$(` would be expanded from other variables; `$$(` stands for it.
    container["env"] = [{"name": k, "value": v.replace("$(", "$$(")} for k, v in environment.items()]
    # With it the driver names its job as a submission does.
    namespace = {"fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.namespace"}}
    container["env"].append({"name": "MUSTER_NAMESPACE", "valueFrom": namespace})
    if settings.get("secrets"):
        container["envFrom"] = [{"secretRef": {"name": name}} for name in settings["secrets"]]
    if settings.get("service_account"):
        spec["serviceAccountName"] = settings["service_account"]
    spec["terminationGracePeriodSeconds"] = settings["grace_s"]
    for volume in spec["volumes"]:
        if volume["name"] == "shared-memory":
            volume["emptyDir"]["sizeLimit"] = from_bytes(_shared_memory(job))


def _place(spec: Manifest, job: ClusterJob) -> None:
    if job.settings.get("node_selector"):
        spec["nodeSelector"] = dict(job.settings["node_selector"])
    if job.settings.get("tolerations"):
        spec["tolerations"] = [dict(toleration) for toleration in job.settings["tolerations"]]


def _with_recipe(template: Manifest, job: ClusterJob) -> None:
    size = len(job.recipe.encode("utf-8", "surrogatepass"))
    if size > RECIPE_BYTES:
        raise ClusterError(
            f"the recipe has {size} bytes, and {RECIPE_BYTES} fit into the annotation that it travels in (Kubernetes "
            "takes 256 KiB); name data by globs or folders in place of single files"
        )
    template["metadata"]["annotations"][RECIPE_ANNOTATION] = job.recipe


def _worker_resources(container: Manifest, job: ClusterJob) -> None:
    per_pod = job.settings["workers_per_pod"]
    memory = to_bytes(job.settings["memory_per_worker"], "cluster.kubernetes.memory_per_worker")
    amounts = {
        "cpu": str(max(1, job.cpus_per_worker * per_pod)),
        # The content of /dev/shm counts against the pod's limit.
        "memory": from_bytes(memory * per_pod + _shared_memory(job)),
    }
    if job.gpus_per_worker:
        amounts[job.settings["gpu_resource"]] = str(job.gpus_per_worker * per_pod)
    container["resources"] = {"requests": dict(amounts), "limits": dict(amounts)}


def _shared_memory(job: ClusterJob) -> int:
    size = to_bytes(job.settings["shared_memory"], "cluster.kubernetes.shared_memory")
    if size < SHARED_MEMORY_BYTES:
        raise ClusterError(
            f"cluster.kubernetes.shared_memory is {job.settings['shared_memory']!r}; Ray and NCCL need at least 256Mi"
        )
    return size


class ManifestDumper(yaml.SafeDumper):
    """Writes a text of several lines as a block, and quotes a text that some reader of YAML takes for another type."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    text.encode()  # raises for half of a surrogate pair, which PyYAML writes and kubectl does not read
    block = "\n" in text.rstrip("\n") and text.replace("\n", "").isprintable()
    style = "|" if block else None if text.isprintable() else '"'  # only double quotes keep other line breaks
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


ManifestDumper.add_representer(str, _text)
# PyYAML quotes what it would not read as text itself; to kubectl, `y` is a truth value and `1e3` a number as well.
ManifestDumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\.?[0-9]|[yYnN]$"), list("-+.0123456789yYnN")
)


def to_yaml(made: Manifest) -> str:
    """Returns the manifest as one YAML document. Raises ClusterError for a text that YAML cannot hold."""
    try:
        text: str = yaml.dump(made, Dumper=ManifestDumper, sort_keys=False, allow_unicode=True, width=sys.maxsize)
    except UnicodeEncodeError as error:
        raise ClusterError(f"the manifest cannot hold the text {error.object[:60]!r}: {error.reason}") from None
    return text
