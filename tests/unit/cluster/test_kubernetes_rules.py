"""KubeRay's own rules: each is broken once, alone, in a manifest that is right otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from cluster.kubernetes.manifests import manifest
from cluster.kubernetes.rules import problems
from tests.support.kubernetes import job

Break = Callable[[dict[str, Any]], object]


def spec(**fields: Any) -> Break:
    return lambda made: made["spec"].update(fields)


def cluster(**fields: Any) -> Break:
    return lambda made: made["spec"]["rayClusterSpec"].update(fields)


def group(**fields: Any) -> Break:
    return lambda made: made["spec"]["rayClusterSpec"]["workerGroupSpecs"][0].update(fields)


def head(**fields: Any) -> Break:
    return lambda made: made["spec"]["rayClusterSpec"]["headGroupSpec"].update(fields)


def pod(**fields: Any) -> Break:
    return lambda made: made["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"].update(fields)


def variable(name: str, value: str) -> Break:
    def add(made: dict[str, Any]) -> None:
        container = made["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
        container["env"].append({"name": name, "value": value})

    return add


def selected(mode: str = "HTTPMode", retries: int = 0, suspend: bool = False, name: str = "c") -> Break:
    def change(made: dict[str, Any]) -> None:
        del made["spec"]["rayClusterSpec"]
        fields = {"clusterSelector": {"ray.io/cluster": name}, "submissionMode": mode, "backoffLimit": retries}
        made["spec"] |= fields | {"suspend": suspend, "submitterPodTemplate": None, "submitterConfig": None}

    return change


def sidecar(**kept: Any) -> Break:
    nothing = {"submitterPodTemplate": None, "submitterConfig": None}
    return spec(submissionMode="SidecarMode", **(nothing | kept))


def rule(policy: str, ttl: int = 0, **condition: str) -> dict[str, Any]:
    return {"policy": policy, "condition": {**(condition or {"jobStatus": "FAILED"}), "ttlSeconds": ttl}}


def deletion(*rules: dict[str, Any], **fields: Any) -> Break:
    own = {"shutdownAfterJobFinishes": False, "ttlSecondsAfterFinished": 0} | fields
    return spec(deletionStrategy={"deletionRules": list(rules)}, **own)


def both(policy: str) -> dict[str, Any]:
    return {"onSuccess": {"policy": policy}, "onFailure": {"policy": policy}}


def all_of(*breaks: Break) -> Break:
    return lambda made: [each(made) for each in breaks]


ELASTIC = cluster(enableInTreeAutoscaling=True)
V2 = cluster(autoscalerOptions={"version": "v2"})

BROKEN: list[tuple[str, Break]] = [
    ("longer than 47", lambda made: made["metadata"].update(name="x" * 48)),
    ("no DNS label", lambda made: made["metadata"].update(name="3b")),
    ("no DNS label", lambda made: made["metadata"].update(name="a.b")),
    ("submissionMode 'Nope' is none of", spec(submissionMode="Nope")),
    ("entrypoint is empty", spec(entrypoint="  ")),
    (
        "suspend needs shutdownAfterJobFinishes",
        spec(suspend=True, shutdownAfterJobFinishes=False, ttlSecondsAfterFinished=0),
    ),
    ("suspend and clusterSelector", selected(suspend=True)),
    ("one of rayClusterSpec and clusterSelector", lambda made: made["spec"].pop("rayClusterSpec")),
    ("names no ray.io/cluster", selected(name="")),
    ("clusterSelector and SidecarMode", selected(mode="SidecarMode")),
    ("backoffLimit -1 is negative", spec(backoffLimit=-1)),
    ("backoffLimit and clusterSelector", selected(retries=1)),
    ("backoffLimit and InteractiveMode", spec(submissionMode="InteractiveMode")),
    ("activeDeadlineSeconds 0", spec(activeDeadlineSeconds=0)),
    ("preRunningDeadlineSeconds -5", spec(preRunningDeadlineSeconds=-5)),
    ("submitterConfig and SidecarMode", sidecar(submitterConfig={"backoffLimit": 1})),
    ("submitterPodTemplate and SidecarMode", sidecar(submitterPodTemplate={"spec": {}})),
    ("SidecarMode needs restartPolicy Never", all_of(sidecar(), pod(restartPolicy="Always"))),
    ("runtimeEnvYAML is no YAML", spec(runtimeEnvYAML="a: [")),
    ("ttlSecondsAfterFinished -1 is negative", spec(ttlSecondsAfterFinished=-1)),
    ("ttlSecondsAfterFinished needs", spec(shutdownAfterJobFinishes=False)),
    ("needs deletionRules, or both", deletion()),
    ("needs deletionRules, or both", spec(deletionStrategy={"onSuccess": {"policy": "DeleteCluster"}})),
    (
        "deletionRules and onSuccess or onFailure",
        spec(
            deletionStrategy={"deletionRules": [rule("DeleteSelf")], **both("DeleteSelf")},
            shutdownAfterJobFinishes=False,
            ttlSecondsAfterFinished=0,
        ),
    ),
    ("deletionRules and shutdownAfterJobFinishes", deletion(rule("DeleteSelf"), shutdownAfterJobFinishes=True)),
    (
        "a deletion policy is missing",
        spec(deletionStrategy={"onSuccess": {"x": 1}, "onFailure": {"policy": "DeleteSelf"}}),
    ),
    ("DeleteWorkers and enableInTreeAutoscaling", all_of(deletion(rule("DeleteWorkers")), ELASTIC)),
    ("only DeleteSelf and DeleteNone", all_of(selected(), deletion(rule("DeleteCluster")))),
    ("DeleteNone and shutdownAfterJobFinishes", spec(deletionStrategy=both("DeleteNone"))),
    ("exactly one of jobStatus", deletion(rule("DeleteSelf", jobStatus="FAILED", jobDeploymentStatus="Failed"))),
    ("exactly one of jobStatus", deletion({"policy": "DeleteSelf", "condition": {"ttlSeconds": 1}})),
    ("negative ttlSeconds", deletion(rule("DeleteSelf", -1))),
    ("repeats DeleteSelf", deletion(rule("DeleteSelf"), rule("DeleteSelf"))),
    ("must not fall along", deletion(rule("DeleteSelf", 1), rule("DeleteCluster", 2))),
    ("needs rayVersion 2.52", cluster(rayVersion="2.51.1")),
    ("needs rayVersion 2.52", cluster(rayVersion="")),
    ("enableK8sTokenAuth", cluster(authOptions={"mode": "token", "enableK8sTokenAuth": True})),
    ("upgradeStrategy", cluster(upgradeStrategy={"type": "Recreate"})),
    (
        "ray.io/ft-enabled and gcsFaultToleranceOptions",
        all_of(
            cluster(gcsFaultToleranceOptions={}),
            lambda made: made["metadata"]["annotations"].update({"ray.io/ft-enabled": "true"}),
        ),
    ),
    ("RAY_REDIS_ADDRESS", variable("RAY_REDIS_ADDRESS", "r:6379")),
    ("password of Redis", all_of(cluster(gcsFaultToleranceOptions={}), variable("REDIS_PASSWORD", "x"))),
    ("user of Redis", head(rayStartParams={"redis-username": "x"})),
    ("the head has no container", pod(containers=[])),
    ("both in rayStartParams and in resources", head(resources={"CPU": "1"})),
    ("labels in rayStartParams", group(rayStartParams={"labels": "a=b"})),
    ("which is none", group(labels={"a b": "c"})),
    ("which is none", group(labels={"a": "c" * 64})),
    (
        "stands there twice",
        lambda made: made["spec"]["rayClusterSpec"]["workerGroupSpecs"].append(
            made["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
        ),
    ),
    ("needs minReplicas and maxReplicas", group(minReplicas=None)),
    ("a negative bound", group(minReplicas=-1)),
    ("minReplicas 3 above maxReplicas 2", group(minReplicas=3, replicas=3)),
    ("outside of its bounds", group(replicas=9)),
    ("is suspended", all_of(ELASTIC, group(suspend=True))),
    ("RAY_enable_autoscaler_v2 needs", variable("RAY_enable_autoscaler_v2", "1")),
    (
        "RAY_enable_autoscaler_v2 and autoscalerOptions.version",
        all_of(all_of(ELASTIC, V2), variable("RAY_enable_autoscaler_v2", "1")),
    ),
    ("idleTimeoutSeconds is negative", cluster(autoscalerOptions={"idleTimeoutSeconds": -1})),
    ("the operator's own", cluster(autoscalerOptions={"env": [{"name": "KUBERAY_GEN_AUTOSCALER_START_CMD"}]})),
    ("the head needs restartPolicy Never", all_of(all_of(ELASTIC, V2), pod(restartPolicy="Always"))),
    ("a negative idleTimeoutSeconds", all_of(V2, group(idleTimeoutSeconds=-1))),
    ("idleTimeoutSeconds, which needs", group(idleTimeoutSeconds=5)),
    ("priority, which needs autoscalerOptions.version v2", group(priority=5)),
    ("priority, which needs rayVersion", all_of(V2, cluster(rayVersion="2.55.0"), group(priority=5))),
]


@pytest.mark.parametrize(("said", "broken"), BROKEN, ids=[said for said, _ in BROKEN])
def test_a_broken_rule_is_named(said: str, broken: Break) -> None:
    made = manifest(job())
    assert problems(made) == []
    broken(made)
    assert any(said in problem for problem in problems(made)), problems(made)


ALLOWED: list[Break] = [
    selected(),
    sidecar(),
    spec(suspend=True),
    spec(deletionStrategy=both("DeleteCluster")),
    deletion(rule("DeleteWorkers", 1), rule("DeleteCluster", 1), rule("DeleteSelf", 2)),
    deletion(rule("DeleteSelf", 1), rule("DeleteCluster", 9, jobStatus="SUCCEEDED")),
    cluster(authOptions={"mode": "disabled"}, rayVersion="2.51.0"),
    cluster(gcsFaultToleranceOptions={"redisAddress": "r:6379"}),
    all_of(V2, group(idleTimeoutSeconds=5, priority=1)),
    all_of(ELASTIC, group(minReplicas=None, maxReplicas=None)),
    group(labels={"cloud.google.com/zone": "a-1", "plain": ""}),
]


@pytest.mark.parametrize("allowed", ALLOWED)
def test_what_the_operator_takes_is_no_problem(allowed: Break) -> None:
    made = manifest(job())
    allowed(made)
    assert problems(made) == []
