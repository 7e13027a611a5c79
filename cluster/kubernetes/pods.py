"""The template of a pod: filled in from the settings, then patched by the user. Pure: data in, data out.

Each pod has one main container, `muster`, which is the first. The recipe is an annotation of the pod that needs it and
is mounted from there: no shell reads it, and Kubernetes' own ``$(NAME)`` is not expanded in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from cluster.job import ClusterError, ClusterJob
from cluster.kubernetes.patch import Fields, merged
from cluster.kubernetes.quantity import from_bytes, to_bytes

MAIN = "muster"
RECIPE_PATH = "/etc/muster/recipe.yaml"
RECIPE_ANNOTATION = "muster/recipe"
RECIPE_VOLUME = "recipe"
RECIPE_BYTES = 252 * 1024
"""Kubernetes takes 256 KiB of annotations per object; the operator and the scheduler add some of their own."""
SHARED_MEMORY_BYTES = 256 * 2**20
"""Least size of /dev/shm: Ray's object store gets half of it, and does not start with less than 75 MB."""
CACHE_PATH = "/var/cache/muster"
CACHE_VOLUME = "model-cache"
CACHE_GROUP = 1000
"""The group of the image's user (Dockerfile)."""

OWN_VARIABLES = ("MUSTER_RAYJOB", "MUSTER_NAMESPACE", "RAY_AUTH_MODE")
"""Variables by which a driver knows its job, and Ray its authentication. A patch cannot change them."""

SUBMITTER_FIELDS = (
    "automountServiceAccountToken", "dnsConfig", "dnsPolicy", "enableServiceLinks", "hostAliases", "imagePullSecrets",
    "nodeSelector", "priorityClassName", "securityContext", "serviceAccountName", "tolerations",
)  # fmt: skip
SUBMITTER_CONTAINER_FIELDS = ("name", "image", "imagePullPolicy", "securityContext")
"""The fields of `pod` that apply to the pod that submits to Ray too: who it is and where it may run. It does not train,
so it needs no volumes, devices, variables or sidecars, and a rule that spreads the workers does not concern it."""


def fill(template: Fields, job: ClusterJob, environment: Mapping[str, str]) -> None:
    """Fills in the settings of every pod of the run: image, credentials by reference, environment, shared memory, model
    cache, grace period."""
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
            volume["emptyDir"]["sizeLimit"] = from_bytes(shared_memory(job))
    if settings.get("model_cache"):
        _add_model_cache(spec, settings["model_cache"])


def _add_model_cache(spec: Fields, claim: str) -> None:
    container = spec["containers"][0]
    spec["volumes"].append({"name": CACHE_VOLUME, "persistentVolumeClaim": {"claimName": claim}})
    container["volumeMounts"].append({"name": CACHE_VOLUME, "mountPath": CACHE_PATH})
    # Not HF_HOME: it also holds tokens and code, which belong to one pod.
    places = {"HF_HUB_CACHE": f"{CACHE_PATH}/hub", "MUSTER_CACHE": f"{CACHE_PATH}/muster"}
    container["env"] += [{"name": name, "value": place} for name, place in places.items()]
    # A new claim belongs to root. Only its top folder's group is looked at, so that a full claim mounts at once.
    spec["securityContext"] |= {"fsGroup": CACHE_GROUP, "fsGroupChangePolicy": "OnRootMismatch"}


def place(spec: Fields, job: ClusterJob) -> None:
    if job.settings.get("node_selector"):
        spec["nodeSelector"] = dict(job.settings["node_selector"])
    if job.settings.get("tolerations"):
        spec["tolerations"] = [dict(toleration) for toleration in job.settings["tolerations"]]


def add_recipe(template: Fields, job: ClusterJob) -> None:
    size = len(job.recipe.encode("utf-8", "surrogatepass"))
    if size > RECIPE_BYTES:
        raise ClusterError(
            f"the recipe has {size} bytes, and {RECIPE_BYTES} fit into the annotation that it travels in (Kubernetes "
            "takes 256 KiB); name data by globs or folders in place of single files"
        )
    template["metadata"]["annotations"][RECIPE_ANNOTATION] = job.recipe


def set_worker_resources(container: Fields, job: ClusterJob) -> None:
    per_pod = job.settings["workers_per_pod"]
    memory = to_bytes(job.settings["memory_per_worker"], "cluster.kubernetes.memory_per_worker")
    amounts = {
        "cpu": str(max(1, job.cpus_per_worker * per_pod)),
        # The content of /dev/shm counts against the pod's limit.
        "memory": from_bytes(memory * per_pod + shared_memory(job)),
    }
    if job.gpus_per_worker:
        amounts[job.settings["gpu_resource"]] = str(job.gpus_per_worker * per_pod)
    container["resources"] = {"requests": dict(amounts), "limits": dict(amounts)}


def shared_memory(job: ClusterJob) -> int:
    size = to_bytes(job.settings["shared_memory"], "cluster.kubernetes.shared_memory")
    if size < SHARED_MEMORY_BYTES:
        raise ClusterError(
            f"cluster.kubernetes.shared_memory is {job.settings['shared_memory']!r}; Ray and NCCL need at least 256Mi"
        )
    return size


# ------------------------------------------------------------------------------------------------ the user's patches


def patch_workers(template: Fields, job: ClusterJob) -> Fields:
    return _patched(template, [_Patch(job, "pod")])


def patch_head(template: Fields, job: ClusterJob) -> Fields:
    """Applies `pod` without the main container's resources, which are the workers', and then `head_pod`."""
    pod = _Patch(job, "pod")
    pod.spec = _with_container(pod.spec, lambda key: key != "resources")
    return _patched(template, [pod, _Patch(job, "head_pod")])


def patch_submitter(template: Fields, job: ClusterJob) -> Fields:
    """Applies the part of `pod` that SUBMITTER_FIELDS describe."""
    pod = _Patch(job, "pod")
    containers = _with_container(pod.spec, lambda key: key in SUBMITTER_CONTAINER_FIELDS).get("containers") or []
    main = [item for item in containers if isinstance(item, Mapping) and item.get("name") == MAIN]
    pod.spec = {key: value for key, value in pod.spec.items() if key in SUBMITTER_FIELDS} | {"containers": main}
    return _patched(template, [pod])


class _Patch:
    """A patch of a pod's template. The user writes the fields of a pod's ``spec``, and ``metadata`` next to them, or a
    template with ``metadata`` and ``spec``: a pod's spec has no fields of these names."""

    def __init__(self, job: ClusterJob, key: str) -> None:
        given, self.where = dict(job.settings.get(key) or {}), f"cluster.kubernetes.{key}"
        self.metadata = {"metadata": given.pop("metadata")} if "metadata" in given else {}
        self.spec, self.spec_where = given, self.where
        if "spec" in given:
            if others := sorted(given.keys() - {"spec"}):
                raise ClusterError(f"{self.where}.{others[0]}: stands beside `spec`; move it into `spec`")
            if not isinstance(given["spec"], Mapping):
                raise ClusterError(f"{self.where}.spec: expected a mapping, got {given['spec']!r}")
            self.spec, self.spec_where = dict(given["spec"]), f"{self.where}.spec"

    def over(self, template: Fields) -> Fields:
        made = merged(template, self.metadata, self.where, "")
        return made | {"spec": merged(template["spec"], self.spec, self.spec_where, "spec")}


def _with_container(spec: Fields, wanted: Callable[[str], bool]) -> Fields:
    """Returns the patch with the ``wanted`` fields of the main container only."""
    if not isinstance(spec.get("containers"), list | tuple):
        return spec
    return spec | {
        "containers": [
            {key: value for key, value in item.items() if wanted(key)}
            if isinstance(item, Mapping) and item.get("name") == MAIN
            else item
            for item in spec["containers"]
        ]
    }


def _patched(template: Fields, patches: list[_Patch]) -> Fields:
    made = template
    for patch in patches:
        before, made = _needed(made), patch.over(made)
        for what, now in _needed(made).items():
            if now != before[what]:
                raise ClusterError(
                    f"{patch.where} changes {what}, which muster needs as it is; remove that from the patch"
                )
        for group in ("containers", "initContainers"):
            for container in made["spec"].get(group, []):
                if not container.get("image"):
                    raise ClusterError(
                        f"{patch.spec_where}.{group}: {container['name']!r} is a new container and has no image; "
                        f"muster's own is {MAIN!r}"
                    )
    # Lists without a merge key are replaced; settings stay in effect beside a patch.
    for old, new, key in (
        (template["spec"], made["spec"], "tolerations"),
        (template["spec"]["containers"][0], made["spec"]["containers"][0], "envFrom"),
    ):
        if old.get(key):
            new[key] = old[key] + [item for item in new.get(key, []) if item not in old[key]]
    return made


def _needed(template: Fields) -> dict[str, Any]:
    """Returns the parts without which the run cannot start or find itself."""
    containers = template["spec"].get("containers") or [{}]
    first = containers[0]
    variables = {item["name"]: item for item in first.get("env", [])}
    mounts = {item["mountPath"]: item for item in first.get("volumeMounts", [])}
    volumes = {item["name"]: item for item in template["spec"].get("volumes", [])}
    return {
        f"the container {MAIN}, which is the first": first.get("name"),
        f"the annotation {RECIPE_ANNOTATION}": template.get("metadata", {})
        .get("annotations", {})
        .get(RECIPE_ANNOTATION),
        f"the volume {RECIPE_VOLUME}": volumes.get(RECIPE_VOLUME),
        "the mount of the recipe": mounts.get(RECIPE_PATH.rpartition("/")[0]),
        **{f"the variable {name}": variables.get(name) for name in OWN_VARIABLES},
        f"the arguments of {MAIN}": first.get("args") if "command" in first else None,
    }
