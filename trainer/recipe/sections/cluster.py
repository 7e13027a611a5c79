"""Where the job runs, when it is started on another machine: what only a scheduler or a cluster has to know."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from trainer.recipe.base import Listed, Location, Section


def _one_line(text: str) -> str:
    if not text.strip() or any(ord(letter) < 32 for letter in text):
        raise ValueError(f"{text!r} is empty or has control characters; give a name on one line")
    return text


Line = Annotated[str, AfterValidator(_one_line)]
"""A text that is handed to another program as one argument or value, never through a shell."""


class RaySection(Section):
    """A Ray cluster that jobs are submitted to (`--on ray`)."""

    address: Location | None = None
    """The dashboard of the cluster's head, e.g. `http://head:8265`; null takes `RAY_API_SERVER_ADDRESS`."""


class SlurmSection(Section):
    """What `--on slurm` asks `sbatch` for, besides the nodes, CPUs and GPUs that `resources` come to."""

    nodes: int | None = Field(default=None, ge=1)
    """Nodes of the job, which share the workers evenly; null: as few as `gpus_per_node` allows."""

    gpus_per_node: int = Field(default=8, ge=1)
    """GPUs that a node has, to know how many workers fit on one; without GPUs a worker has a node of its own."""

    partition: Line | None = None
    """Partition to submit to; null leaves it to Slurm, as every null here does."""

    account: Line | None = None
    """Account that the time is charged to."""

    qos: Line | None = None
    """Quality of service."""

    time: Line | None = None
    """Time limit in Slurm's notation, e.g. `1-12:00:00`. A run that needs more is requeued and goes on."""

    memory_per_node: Line | None = None
    """Memory of each node in Slurm's notation, e.g. `200G`; `0` asks for all that a node has."""

    constraint: Line | None = None
    """Features that the nodes must have."""

    options: Listed[Line] = ()
    """More options for `sbatch`, one in each, e.g. `--reservation=course`."""


class KubernetesSection(Section):
    """What `--on kubernetes` puts into the manifest, besides the workers of `resources`."""

    kind: Literal["rayjob", "jobset"] = "rayjob"
    """`rayjob` needs KubeRay and is elastic; `jobset` runs torchrun on clusters without it, with a fixed size."""

    image: Line | None = None
    """Container image that holds muster, by digest or tag, as `cluster/kubernetes/Dockerfile` makes it; null takes
    `muster:0.1.0`, which only a cluster has that shares its images with the machine that built it."""

    namespace: Line | None = None
    """Namespace of the job; null takes that of kubectl's context."""

    service_account: Line | None = None
    """Service account of the pods, for storage that is reached by workload identity."""

    secrets: Listed[Line] = ()
    """Secrets whose keys become environment variables of the pods (`AWS_ACCESS_KEY_ID`, …), by name: what is in them
    never stands in a recipe or a manifest."""

    queue: Line | None = None
    """Kueue's local queue: the job then waits, suspended, until its largest size is admitted, and has no autoscaler."""

    workers_per_pod: int = Field(default=1, ge=1)
    """Training workers in each pod; more than one keeps the GPUs of a machine together."""

    memory_per_worker: Line = "16Gi"
    """Memory of each worker, requested and limited, as a Kubernetes quantity; `shared_memory` comes on top."""

    shared_memory: Line = "2Gi"
    """Size of each pod's `/dev/shm`, at least `256Mi`: half of it for Ray's objects, the rest for NCCL. It counts as
    memory of the pod."""

    ray_auth: Literal["token", "disabled"] = "token"
    """Who may speak to the run's Ray: with `token` its own pods only, by a secret that KubeRay (1.5 or newer) makes for
    each run; with `disabled` whoever reaches the head's port, and can run code there with the pods' credentials."""

    gpu_resource: Line = "nvidia.com/gpu"
    """Name of the GPUs in the cluster's resources."""

    node_selector: dict[str, str] = Field(default_factory=dict)
    """Labels that the nodes of the workers must have."""

    tolerations: Listed[dict[str, str | int]] = ()
    """Taints that the workers tolerate, as in a pod's specification."""

    grace_s: int = Field(default=120, ge=1)
    """Seconds that a pod has between the notice of its end and its end, in which a checkpoint is committed."""

    retries: int = Field(default=3, ge=0)
    """Times that the job is started again when it fails; each resumes from the newest checkpoint."""


class ClusterSection(Section):
    """Where the job runs when it is started from another machine: `--on ray`, `--on slurm`, `--on kubernetes`. What is
    learned does not depend on any of it."""

    ray: RaySection = RaySection()
    slurm: SlurmSection = SlurmSection()
    kubernetes: KubernetesSection = KubernetesSection()
