"""The target of a job that is started from another machine: the settings of the scheduler or the cluster."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, ValidationInfo

from trainer.recipe.base import STORED, Listed, Location, Section
from trainer.recipe.rules.variables import Variables, credentials


def _one_line(text: str) -> str:
    if not text.strip() or any(ord(letter) < 32 for letter in text):
        raise ValueError(f"{text!r} is empty or has control characters; give a name on one line")
    return text


Line = Annotated[str, AfterValidator(_one_line)]
"""A text that is passed to another program as one argument or value, never through a shell."""


def _submission_id(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(f"{name!r} cannot name a job of Ray: use letters, digits, '.', '_' and '-'")
    return name


def _runtime_env(value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
    """Accepts what Ray takes from a client: files of this machine are read by muster, and only where it says so."""
    for name in ("pip", "uv", "conda"):
        packages = value.get(name)
        path = isinstance(packages, str) and (name != "conda" or packages.endswith((".yml", ".yaml")))
        if path or (isinstance(packages, dict) and isinstance(packages.get("packages"), str)):
            raise ValueError(f"{name} names a file; write its packages here, as a list")
    folder, modules, variables = value.get("working_dir"), value.get("py_modules", []), value.get("env_vars", {})
    if folder is not None and (not isinstance(folder, str) or "://" in folder or folder.endswith(".zip")):
        raise ValueError("working_dir is a folder of this machine, whose files are added to muster's own")
    if "excludes" in value:
        raise ValueError("excludes has no effect here; name a folder with the code only")
    if not isinstance(modules, list) or not all(isinstance(module, str) for module in modules):
        raise ValueError("py_modules is a list of folders, wheels or URLs")
    if not isinstance(variables, dict) or not all(isinstance(v, str) for v in variables.values()):
        raise ValueError("env_vars is a mapping of names to texts; write numbers in quotes")
    if not (info.context or {}).get(STORED) and (found := list(credentials(variables))):
        raise ValueError("; ".join(found))
    return value


RuntimeEnv = Annotated[dict[str, Any], AfterValidator(_runtime_env)]


class RaySection(Section):
    """A Ray cluster that jobs are submitted to (`--on ray`)."""

    address: Location | None = None
    """The dashboard of the cluster's head, e.g. `http://head:8265`; null takes `RAY_API_SERVER_ADDRESS`."""

    runtime_env: RuntimeEnv = Field(default_factory=dict)
    """Ray's runtime environment of the submitted job, e.g. `{pip: [sentencepiece], env_vars: {…}}`. `working_dir` is a
    local folder, whose files are added to muster's own. A driver that joins a cluster (`RAY_ADDRESS`) ignores it."""

    submission_id: Annotated[Line, AfterValidator(_submission_id)] | None = None
    """Name of the job in Ray; null makes one from the run's name. A job of that name that has ended is replaced."""

    metadata: dict[str, Line] = Field(default_factory=dict)
    """Metadata of the job, which Ray shows. `run` is always the run's URI."""

    entrypoint_num_cpus: float | None = Field(default=None, ge=0)
    """CPUs that the driver takes of its node; null takes none."""

    entrypoint_num_gpus: float | None = Field(default=None, ge=0)
    """GPUs that the driver takes; with one, it runs on a node with GPUs."""

    entrypoint_memory: int | None = Field(default=None, ge=0)
    """Memory that the driver takes, in bytes."""

    entrypoint_resources: dict[str, float] = Field(default_factory=dict)
    """Custom resources that the driver takes, e.g. `{head_node: 0.01}` to run on a node that has them."""


class SlurmSection(Section):
    """Settings of `sbatch` for `--on slurm`. The nodes, CPUs and GPUs are computed from `resources`."""

    nodes: int | None = Field(default=None, ge=1)
    """Number of nodes of the job, each with the same number of workers; null: as few as `gpus_per_node` allows."""

    gpus_per_node: int = Field(default=8, ge=1)
    """GPUs of a node, which decide how many workers fit on one; without GPUs each worker gets its own node."""

    partition: Line | None = None
    """Partition to submit to; null, here and below, uses Slurm's default."""

    account: Line | None = None
    """Account that the time is charged to."""

    qos: Line | None = None
    """Quality of service."""

    time: Line | None = None
    """Time limit in Slurm's notation, e.g. `1-12:00:00`. A run that needs more is requeued and resumes."""

    memory_per_node: Line | None = None
    """Memory of each node in Slurm's notation, e.g. `200G`; `0` requests all memory of a node."""

    constraint: Line | None = None
    """Features that the nodes must have."""

    options: Listed[Line] = ()
    """More options for `sbatch`, one per entry, e.g. `--reservation=course`."""

    container: Line | None = None
    """Image that the job runs in: a file `*.sif` or a folder for Apptainer, anything else (`image.sqsh`,
    `registry#name:tag`) for enroot through Slurm's plugin pyxis. Null runs in the environment of the submission."""

    container_mounts: Listed[Line] = ()
    """Folders of the nodes that the container has, as `SOURCE:TARGET`, or `SOURCE:TARGET:ro`. The submission folder is
    always there."""


class KubernetesSection(Section):
    """Settings of the manifest for `--on kubernetes`. The workers are computed from `resources`."""

    others: ClassVar[str | None] = (
        "every other field of pods is set under cluster.kubernetes.pod, in Kubernetes' own words, and labels and "
        "annotations of the job under cluster.kubernetes.metadata"
    )

    kind: Literal["rayjob", "jobset", "trainjob"] = "rayjob"
    """`rayjob` needs KubeRay and is elastic. `jobset` (JobSet) and `trainjob` (Kubeflow Trainer v2) run torchrun with a
    fixed number of workers, without Ray."""

    image: Line | None = None
    """Container image with muster, by digest or tag, built from `cluster/kubernetes/Dockerfile`; null takes
    `muster:0.1.0`, which exists only in a cluster that shares its images with the machine that built it."""

    namespace: Line | None = None
    """Namespace of the job; null takes that of kubectl's context."""

    service_account: Line | None = None
    """Service account of the pods, for storage that is reached by workload identity."""

    secrets: Listed[Line] = ()
    """Names of secrets whose keys become environment variables of the pods (`AWS_ACCESS_KEY_ID`, …). Their values are
    never written to a recipe or a manifest."""

    queue: Line | None = None
    """Kueue's local queue: the job is suspended until its largest size is admitted, and has no autoscaler."""

    workers_per_pod: int = Field(default=1, ge=1)
    """Training workers in each pod; more than one keeps the GPUs of a machine together."""

    memory_per_worker: Line = "16Gi"
    """Memory of each worker, requested and limited, as a Kubernetes quantity; `shared_memory` is added to it."""

    shared_memory: Line = "2Gi"
    """Size of each pod's `/dev/shm`, at least `256Mi`: half of it for Ray's objects, the rest for NCCL. It counts as
    memory of the pod."""

    ray_auth: Literal["token", "disabled"] = "token"
    """Who may connect to the run's Ray. With `token`: its own pods only, by a secret that KubeRay (1.5.1 or newer)
    makes for each run. With `disabled`: everyone who reaches the head's port, who can also run code there with the
    pods' credentials."""

    gpu_resource: Line = "nvidia.com/gpu"
    """Name of the GPUs in the cluster's resources."""

    node_selector: dict[str, str] = Field(default_factory=dict)
    """Labels that the nodes of the workers must have."""

    tolerations: Listed[dict[str, str | int]] = ()
    """Taints that the workers tolerate, as in a pod's specification."""

    grace_s: int = Field(default=120, ge=1)
    """Seconds between the notice that a pod will stop and its end; a checkpoint is committed in that time."""

    retries: int = Field(default=3, ge=0)
    """Times that the job is started again when it fails; each resumes from the newest checkpoint."""

    ttl_s: int | None = Field(default=None, ge=0)
    """Seconds after its end until a job's pods are deleted; null: 600 for a RayJob, a day for the others. The
    checkpoints are in the storage, and resuming needs no pod."""

    deadline_s: int | None = Field(default=None, ge=1)
    """Seconds after its start until the cluster ends a job that still runs; null: no limit. The workers commit, and the
    run can be resumed. For a JobSet, the time begins again with each retry."""

    model_cache: Line | None = None
    """Name of a PersistentVolumeClaim for base models, mounted in every pod that loads them, so that each model is
    fetched once. Pods on several nodes need the access mode ReadWriteMany and a file system with locks (`flock`)."""

    pod: dict[str, Any] = Field(default_factory=dict)
    """Fields of a pod's `spec`, and `metadata` for its labels and annotations, merged over every pod as a strategic
    merge patch. muster's container is called `muster`; its `resources` here are the workers'. A pod that only submits
    takes what concerns its identity and its nodes."""

    head_pod: dict[str, Any] = Field(default_factory=dict)
    """The same, over a RayJob's head pod only, after `pod`: its size (2 CPUs and 8Gi by default) and its nodes."""

    metadata: dict[str, Any] = Field(default_factory=dict)
    """Labels and annotations of the job itself, merged over its `metadata`."""


def _task_options(value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
    if not (info.context or {}).get(STORED):
        named = [value[name] for name in ("envs", "secrets") if isinstance(value.get(name), dict)]
        if found := [text for each in named for text in credentials({k: v for k, v in each.items() if v is not None})]:
            raise ValueError("; ".join(found))
    return value


class SkyPilotSection(Section):
    """Settings of the task that `muster render RECIPE --on skypilot` writes. The nodes and workers are computed from
    `resources`."""

    accelerators: Line | None = None
    """Kind of the GPUs in SkyPilot's words, e.g. `H100`; their number per node is computed."""

    gpus_per_node: int = Field(default=8, ge=1)
    """GPUs of a node, which decide how many workers fit on one; without GPUs each worker gets its own node."""

    resources: dict[str, Any] = Field(default_factory=dict)
    """More of the task's `resources`, e.g. `{infra: aws, use_spot: true}` or `any_of`; replaces what is computed."""

    setup: str | None = None
    """Commands that install muster on a node; null installs the version of this machine from the package index."""

    options: Annotated[dict[str, Any], AfterValidator(_task_options)] = Field(default_factory=dict)
    """More fields of the task, e.g. `{file_mounts: {/data: s3://corpus}, secrets: {AWS_ACCESS_KEY_ID: null}}`."""


class ClusterSection(Section):
    """The target of a job that is started from another machine: `--on ray`, `--on slurm`, `--on kubernetes`, and the
    environment of the workers. The result does not depend on these settings."""

    env: Variables = Field(default_factory=dict)
    """Environment variables of the driver and of the workers, on every kind of cluster and on this machine, e.g.
    `{NCCL_SOCKET_IFNAME: eth0, HF_HOME: /scratch/hf}`. They replace variables of the same name, and are set before the
    libraries that read them are imported. Credentials are refused: a recipe is stored and printed."""

    ray: RaySection = RaySection()
    slurm: SlurmSection = SlurmSection()
    kubernetes: KubernetesSection = KubernetesSection()
    skypilot: SkyPilotSection = SkyPilotSection()
