"""Rules of KubeRay's operator that its CRD does not contain.

`kubectl` accepts a job that breaks one of these, and the job then stays `ValidationFailed`. The rules are those of the
operator 1.7 (https://github.com/ray-project/kuberay, ray-operator/controllers/ray/utils/validation.go and
pkg/webhooks/v1), as facts; those that depend on a feature gate hold for the default gates.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from cluster.kubernetes.names import RAYJOB_LENGTH

Fields = Mapping[str, Any]

SUBMISSION_MODES = ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
TOKEN_SINCE, PRIORITY_SINCE = (2, 52), (2, 56)
DELETION_ORDER = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")

_DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
_LABEL_PART = r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
_LABEL_KEY = re.compile(rf"([a-z0-9]([-a-z0-9.]{{0,251}}[a-z0-9])?/)?{_LABEL_PART}")
_LABEL_VALUE = re.compile(rf"({_LABEL_PART})?")
_OWN_RESOURCES = ("num-cpus", "num-gpus", "memory", "resources")


def problems(manifest: Fields) -> list[str]:
    """Each broken rule in a sentence's part; empty when the operator takes this RayJob."""
    metadata, spec = manifest.get("metadata", {}), manifest.get("spec", {})
    found = [*_name(metadata), *_job(spec), *_deletion(spec)]
    cluster = spec.get("rayClusterSpec")
    if cluster is not None:
        found += [*_cluster(cluster, metadata.get("annotations", {})), *_groups(cluster), *_autoscaler(cluster)]
    return found


def _name(metadata: Fields) -> Iterator[str]:
    name = metadata.get("name", "")
    if len(name) > RAYJOB_LENGTH:
        yield f"metadata.name {name!r} is longer than {RAYJOB_LENGTH} characters"
    if not _DNS_LABEL.fullmatch(name):
        yield f"metadata.name {name!r} is no DNS label (lower-case letters, digits and -, a letter first)"


_SUBMITTER = ("submitterPodTemplate", "submitterConfig")


def _job(spec: Fields) -> Iterator[str]:
    mode, selector = spec.get("submissionMode", "K8sJobMode"), spec.get("clusterSelector") or {}
    retries, cluster = spec.get("backoffLimit", 0), spec.get("rayClusterSpec")
    if mode not in SUBMISSION_MODES:
        yield f"submissionMode {mode!r} is none of {', '.join(SUBMISSION_MODES)}"
    if mode != "InteractiveMode" and not spec.get("entrypoint", "").strip():
        yield "entrypoint is empty"
    if spec.get("suspend") and not spec.get("shutdownAfterJobFinishes"):
        yield "suspend needs shutdownAfterJobFinishes"
    if spec.get("suspend") and selector:
        yield "suspend and clusterSelector exclude each other"
    if cluster is None and not selector:
        yield "one of rayClusterSpec and clusterSelector is needed"
    if selector and not selector.get("ray.io/cluster"):
        yield "clusterSelector names no ray.io/cluster"
    if selector and mode == "SidecarMode":
        yield "clusterSelector and SidecarMode exclude each other"
    if retries < 0:
        yield f"backoffLimit {retries} is negative"
    if retries > 0 and (selector or mode == "InteractiveMode"):
        yield f"backoffLimit and {'clusterSelector' if selector else mode} exclude each other"
    for field in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if spec.get(field, 1) <= 0:
            yield f"{field} {spec[field]} is not positive"
    if mode == "SidecarMode":
        yield from (f"{key} and SidecarMode exclude each other" for key in _SUBMITTER if spec.get(key) is not None)
        if cluster and _restarts(cluster.get("headGroupSpec", {})):
            yield "SidecarMode needs restartPolicy Never on the head"
    try:
        yaml.safe_load(spec.get("runtimeEnvYAML") or "")
    except yaml.YAMLError:
        yield "runtimeEnvYAML is no YAML"


def _deletion(spec: Fields) -> Iterator[str]:
    shutdown, ttl, strategy = spec.get("shutdownAfterJobFinishes"), spec.get("ttlSecondsAfterFinished", 0), None
    if ttl < 0:
        yield f"ttlSecondsAfterFinished {ttl} is negative"
    if ttl > 0 and not shutdown:
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
    if (strategy := spec.get("deletionStrategy")) is None:
        return
    rules, old = strategy.get("deletionRules") or [], [strategy.get(key) for key in ("onSuccess", "onFailure")]
    if not rules and not all(old):
        yield "deletionStrategy needs deletionRules, or both onSuccess and onFailure"
    if rules and any(old):
        yield "deletionRules and onSuccess or onFailure exclude each other"
    if rules and shutdown:
        yield "deletionRules and shutdownAfterJobFinishes exclude each other"
    policies = [rule.get("policy") for rule in rules] + [(policy or {}).get("policy") for policy in old if policy]
    if None in policies:
        yield "a deletion policy is missing"
    elastic = (spec.get("rayClusterSpec") or {}).get("enableInTreeAutoscaling")
    if elastic and "DeleteWorkers" in policies:
        yield "DeleteWorkers and enableInTreeAutoscaling exclude each other"
    if spec.get("clusterSelector") and {"DeleteWorkers", "DeleteCluster"} & set(policies):
        yield "with clusterSelector only DeleteSelf and DeleteNone are possible"
    if shutdown and not rules and "DeleteNone" in policies:
        yield "DeleteNone and shutdownAfterJobFinishes exclude each other"
    yield from _deletion_rules(rules)


def _deletion_rules(rules: list[Fields]) -> Iterator[str]:
    ttls: dict[tuple[str, str], dict[str, int]] = {}
    for index, rule in enumerate(rules):
        condition = rule.get("condition", {})
        given = [(key, condition[key]) for key in ("jobStatus", "jobDeploymentStatus") if condition.get(key)]
        if len(given) != 1:
            yield f"deletionRules[{index}] needs exactly one of jobStatus and jobDeploymentStatus"
            continue
        ttl, per_policy = condition.get("ttlSeconds", 0), ttls.setdefault(given[0], {})
        if ttl < 0:
            yield f"deletionRules[{index}] has a negative ttlSeconds"
        if rule.get("policy") in per_policy:
            yield f"deletionRules[{index}] repeats {rule['policy']} for {given[0][1]}"
        per_policy[rule.get("policy", "")] = ttl
    for (_, status), per_policy in ttls.items():
        times = [per_policy[policy] for policy in DELETION_ORDER if policy in per_policy]
        if times != sorted(times):
            yield f"deletionRules for {status}: ttlSeconds must not fall along {', '.join(DELETION_ORDER)}"


def _cluster(cluster: Fields, annotations: Fields) -> Iterator[str]:
    auth = cluster.get("authOptions") or {}
    token = bool(auth) and auth.get("mode", "token") == "token"
    if token and _version(cluster) < TOKEN_SINCE:
        yield f"authOptions token needs rayVersion 2.52 or newer, not {cluster.get('rayVersion')!r}"
    if auth.get("enableK8sTokenAuth"):
        yield "enableK8sTokenAuth is not possible in a RayJob"
    if cluster.get("upgradeStrategy"):
        yield "upgradeStrategy is not possible in a RayJob"
    head = cluster.get("headGroupSpec", {})
    environment, fault_tolerant = _environment(head), cluster.get("gcsFaultToleranceOptions") is not None
    if fault_tolerant and annotations.get("ray.io/ft-enabled"):
        yield "ray.io/ft-enabled and gcsFaultToleranceOptions exclude each other"
    if "RAY_REDIS_ADDRESS" in environment and (fault_tolerant or annotations.get("ray.io/ft-enabled") != "true"):
        yield "RAY_REDIS_ADDRESS belongs in gcsFaultToleranceOptions"
    if fault_tolerant and ("REDIS_PASSWORD" in environment or head.get("rayStartParams", {}).get("redis-password")):
        yield "the password of Redis belongs in gcsFaultToleranceOptions"
    if "REDIS_USERNAME" in environment or head.get("rayStartParams", {}).get("redis-username"):
        yield "the user of Redis belongs in gcsFaultToleranceOptions"


def _groups(cluster: Fields) -> Iterator[str]:
    elastic, names = cluster.get("enableInTreeAutoscaling"), set()
    for name, group in _named_groups(cluster):
        if not _containers(group):
            yield f"{name} has no container"
        parameters = group.get("rayStartParams", {})
        if group.get("resources") and any(parameters.get(key) for key in _OWN_RESOURCES):
            yield f"{name} gives its resources both in rayStartParams and in resources"
        if "labels" in parameters:
            yield f"{name} has labels in rayStartParams; they belong in the group's own labels"
        for key, value in (group.get("labels") or {}).items():
            if not _LABEL_KEY.fullmatch(key) or not _LABEL_VALUE.fullmatch(value):
                yield f"{name} has the label {key}={value}, which is none"
    for group in cluster.get("workerGroupSpecs", []):
        name, low, high = f"group {group.get('groupName')!r}", group.get("minReplicas"), group.get("maxReplicas")
        if name in names:
            yield f"{name} stands there twice"
        names.add(name)
        if not elastic and (low is None or high is None):
            yield f"{name} needs minReplicas and maxReplicas"
        if min(low or 0, high or 0) < 0:
            yield f"{name} has a negative bound"
        if low is not None and high is not None and low > high:
            yield f"{name} has minReplicas {low} above maxReplicas {high}"
        if not (low or 0) <= group.get("replicas", low or 0) <= (group.get("replicas", 0) if high is None else high):
            yield f"{name} has replicas {group['replicas']} outside of its bounds"
        if group.get("suspend") and elastic:
            yield f"{name} is suspended, which enableInTreeAutoscaling excludes"


def _autoscaler(cluster: Fields) -> Iterator[str]:
    elastic, options = cluster.get("enableInTreeAutoscaling"), cluster.get("autoscalerOptions") or {}
    second, head = options.get("version") == "v2", cluster.get("headGroupSpec", {})
    variable = _environment(head).get("RAY_enable_autoscaler_v2")
    if not elastic and variable in ("1", "true"):
        yield "RAY_enable_autoscaler_v2 needs enableInTreeAutoscaling"
    if elastic and options.get("version") and variable is not None:
        yield "RAY_enable_autoscaler_v2 and autoscalerOptions.version exclude each other"
    if options.get("idleTimeoutSeconds", 0) < 0:
        yield "autoscalerOptions.idleTimeoutSeconds is negative"
    if any(item["name"] == "KUBERAY_GEN_AUTOSCALER_START_CMD" for item in options.get("env", [])):
        yield "KUBERAY_GEN_AUTOSCALER_START_CMD is the operator's own"
    if elastic and second:
        yield from (f"{name} needs restartPolicy Never" for name, group in _named_groups(cluster) if _restarts(group))
    for name, group in _named_groups(cluster):
        if group.get("idleTimeoutSeconds", 0) < 0:
            yield f"{name} has a negative idleTimeoutSeconds"
        for field in ("idleTimeoutSeconds", "priority"):
            if group.get(field) and not second and variable not in ("1", "true"):
                yield f"{name} has {field}, which needs autoscalerOptions.version v2"
        if group.get("priority") and _version(cluster) < PRIORITY_SINCE:
            yield f"{name} has priority, which needs rayVersion 2.56 or newer"


def _named_groups(cluster: Fields) -> Iterator[tuple[str, Fields]]:
    yield "the head", cluster.get("headGroupSpec", {})
    for group in cluster.get("workerGroupSpecs", []):
        yield f"group {group.get('groupName')!r}", group


def _pod(group: Fields) -> Fields:
    pod: Fields = group.get("template", {}).get("spec", {})
    return pod


def _containers(group: Fields) -> list[Fields]:
    containers: list[Fields] = _pod(group).get("containers") or []
    return containers


def _environment(group: Fields) -> dict[str, str | None]:
    """Returns the environment of the Ray container, which is the first one."""
    return {item["name"]: item.get("value") for c in _containers(group)[:1] for item in c.get("env", [])}


def _restarts(group: Fields) -> bool:
    return str(_pod(group).get("restartPolicy", "Never")) != "Never"


def _version(cluster: Fields) -> tuple[int, ...]:
    found = re.match(r"v?(\d+)\.(\d+)", cluster.get("rayVersion") or "")
    return (int(found[1]), int(found[2])) if found else (0, 0)
