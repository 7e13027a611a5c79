"""What a platform team writes into `pod`, `head_pod` and `metadata`, and what every pod has without it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.job import ClusterError
from cluster.kubernetes import Kubernetes
from cluster.kubernetes.kinds import KINDS, manifests
from cluster.kubernetes.pods import CACHE_GROUP
from tests.support.crds import VARIABLE, crds, refused
from tests.support.kubernetes import job
from tests.support.pod_security import violations

ROOT = Path(__file__).resolve().parents[3]
MUSTER = {"name": "muster"}
RDMA = {"rdma/hca": 1, "vpc.amazonaws.com/efa": 4}
SPREAD = {
    "maxSkew": 1,
    "topologyKey": "topology.kubernetes.io/zone",
    "whenUnsatisfiable": "ScheduleAnyway",
    "labelSelector": {"matchLabels": {"cost-centre": "4711"}},
}
NODES = [{"matchExpressions": [{"key": "gpu.model", "operator": "In", "values": ["H100"]}]}]
NODE_AFFINITY = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": NODES}}
POD: dict[str, Any] = {
    "metadata": {"labels": {"cost-centre": "4711"}, "annotations": {"sidecar.istio.io/inject": "false"}},
    "imagePullSecrets": [{"name": "registry"}],
    "priorityClassName": "batch",
    "runtimeClassName": "nvidia",
    "hostNetwork": True,
    "tolerations": [{"key": "dedicated", "operator": "Exists"}],
    "affinity": {"nodeAffinity": NODE_AFFINITY},
    "topologySpreadConstraints": [SPREAD],
    "securityContext": {"fsGroup": 2000},
    "volumes": [{"name": "scratch", "persistentVolumeClaim": {"claimName": "scratch"}}],
    "initContainers": [{"name": "metrics", "image": "exporter:1", "restartPolicy": "Always"}],
    "containers": [
        MUSTER
        | {
            "imagePullPolicy": "Always",
            "env": [{"name": "NCCL_SOCKET_IFNAME", "value": "eth0"}],
            "envFrom": [{"configMapRef": {"name": "nccl"}}],
            "resources": {"requests": RDMA, "limits": RDMA},
            "volumeMounts": [{"name": "scratch", "mountPath": "/scratch"}],
            "securityContext": {"capabilities": {"add": ["IPC_LOCK"]}},
        }
    ],
}
HEAD = {
    "hostNetwork": None,
    "nodeSelector": {"pool": "cpu"},
    "containers": [MUSTER | {"resources": {"requests": {"cpu": "8"}, "limits": {"cpu": "8"}}}],
}
EVERYTHING: dict[str, Any] = {
    "secrets": ["s3"],
    "tolerations": [{"key": "spot", "operator": "Exists"}],
    "node_selector": {"pool": "gpu"},
    "gpu_resource": "nvidia.com/mig-3g.40gb",
    "model_cache": "models",
    "ttl_s": 60,
    "deadline_s": 3600,
    "metadata": {"labels": {"kueue.x-k8s.io/priority-class": "high"}, "annotations": {"owner": "nlp"}},
    "pod": POD,
}


def everything(kind: str, **given: Any) -> list[dict[str, Any]]:
    head = {"head_pod": HEAD} if kind == "rayjob" else {}
    return manifests(job(workers=(4, 4), kind=kind, **(EVERYTHING | head | given)))


def templates(objects: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns the templates of all pods, by their role."""
    spec = objects[-1]["spec"]
    if objects[-1]["kind"] == "RayJob":
        cluster = spec["rayClusterSpec"]
        return {
            "submitter": spec["submitterPodTemplate"],
            "head": cluster["headGroupSpec"]["template"],
            "worker": cluster["workerGroupSpecs"][0]["template"],
        }
    spec = objects[0]["spec"]
    jobset = spec["template"]["spec"] if objects[0]["kind"] == "TrainingRuntime" else spec
    return {"worker": jobset["replicatedJobs"][0]["template"]["spec"]["template"]}


def main(template: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = template["spec"]["containers"][0]
    return made


def named(items: list[dict[str, Any]], key: str = "name") -> dict[str, dict[str, Any]]:
    made = {item[key]: item for item in items}
    assert len(made) == len(items)
    return made


# ------------------------------------------------------------------------------------------------ what can be written


@pytest.mark.parametrize("kind", KINDS)
def test_every_usual_field_arrives_at_the_workers(kind: str) -> None:
    worker = templates(everything(kind))["worker"]
    spec, container = worker["spec"], main(worker)
    assert worker["metadata"]["labels"]["cost-centre"] == "4711"
    assert worker["metadata"]["annotations"]["sidecar.istio.io/inject"] == "false"
    for field in ("imagePullSecrets", "priorityClassName", "runtimeClassName", "hostNetwork", "affinity"):
        assert spec[field] == POD[field]
    assert spec["topologySpreadConstraints"] == [SPREAD]
    assert spec["tolerations"] == [*EVERYTHING["tolerations"], *POD["tolerations"]], "settings stay in effect"
    assert spec["nodeSelector"] == {"pool": "gpu"}
    assert spec["securityContext"]["fsGroup"] == 2000
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["initContainers"] == POD["initContainers"]
    assert {"shared-memory", "model-cache", "scratch"} <= named(spec["volumes"]).keys()
    assert {"/dev/shm", "/var/cache/muster", "/scratch"} <= named(container["volumeMounts"], "mountPath").keys()
    assert container["imagePullPolicy"] == "Always"
    assert named(container["env"])["NCCL_SOCKET_IFNAME"]["value"] == "eth0"
    assert container["envFrom"] == [{"secretRef": {"name": "s3"}}, {"configMapRef": {"name": "nccl"}}]
    limits = container["resources"]["limits"]
    assert limits == {"cpu": "4", "memory": "18Gi", "nvidia.com/mig-3g.40gb": "1"} | RDMA
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}


@pytest.mark.parametrize("kind", KINDS)
def test_the_job_has_its_own_labels_and_limits_of_time(kind: str) -> None:
    objects = everything(kind)
    metadata, spec = objects[-1]["metadata"], objects[-1]["spec"]
    assert metadata["labels"] == {"app.kubernetes.io/name": "muster", "kueue.x-k8s.io/priority-class": "high"}
    assert metadata["annotations"]["owner"] == "nlp"
    assert metadata["annotations"]["muster/run-uri"] == "s3://runs/gsm8k"
    if kind == "jobset":
        assert spec["ttlSecondsAfterFinished"] == 60
        assert spec["replicatedJobs"][0]["template"]["spec"]["activeDeadlineSeconds"] == 3600
        first = spec["failurePolicy"]["rules"][0]
        assert (first["action"], first["onJobFailureReasons"]) == ("FailJobSet", ["DeadlineExceeded"])
    else:
        assert spec["activeDeadlineSeconds"] == 3600
        assert {"rayjob": spec, "trainjob": objects[0]["spec"].get("template", {}).get("spec")}[kind][
            "ttlSecondsAfterFinished"
        ] == 60  # fmt: skip


def test_the_head_has_a_size_and_nodes_of_its_own() -> None:
    head = templates(everything("rayjob"))["head"]
    assert main(head)["resources"]["limits"] == {"cpu": "8", "memory": "8Gi"}, "the workers' resources are not its own"
    assert head["spec"]["nodeSelector"] == {"pool": "cpu"}
    assert "hostNetwork" not in head["spec"]
    assert head["spec"]["imagePullSecrets"] == POD["imagePullSecrets"]
    assert head["spec"]["tolerations"] == POD["tolerations"]
    assert main(head)["envFrom"] == main(templates(everything("rayjob"))["worker"])["envFrom"]


def test_the_submitter_takes_what_concerns_its_identity_and_its_nodes() -> None:
    submitter = templates(everything("rayjob"))["submitter"]
    spec, container = submitter["spec"], main(submitter)
    assert submitter["metadata"] == POD["metadata"]
    assert spec["imagePullSecrets"] == POD["imagePullSecrets"]
    assert spec["tolerations"] == POD["tolerations"]
    assert (spec["priorityClassName"], container["imagePullPolicy"]) == ("batch", "Always")
    assert not spec.keys() & {"volumes", "initContainers", "hostNetwork", "affinity", "runtimeClassName"}
    assert not container.keys() & {"env", "envFrom", "volumeMounts"}
    assert container["resources"]["limits"] == {"cpu": "1", "memory": "1Gi"}


def test_a_sidecar_runs_beside_the_head_and_the_workers_only() -> None:
    sidecar = {"name": "exporter", "image": "exporter:1"}
    found = templates(manifests(job(pod={"containers": [sidecar, MUSTER | {"imagePullPolicy": "Always"}]})))
    names = {role: [container["name"] for container in made["spec"]["containers"]] for role, made in found.items()}
    assert names == {"submitter": ["muster"], "head": ["muster", "exporter"], "worker": ["muster", "exporter"]}
    assert main(found["submitter"])["imagePullPolicy"] == "Always"


@pytest.mark.parametrize("kind", KINDS)
def test_a_patch_may_have_the_form_of_a_template(kind: str) -> None:
    fields = {key: value for key, value in POD.items() if key != "metadata"}
    assert everything(kind, pod={"metadata": POD["metadata"], "spec": fields}) == everything(kind)


def test_the_main_container_has_one_name_but_in_a_trainjob_which_wants_another() -> None:
    found = [*templates(everything("rayjob")).values(), *templates(everything("jobset")).values()]
    assert [main(template)["name"] for template in found] == ["muster"] * 4
    objects = everything("trainjob")
    assert main(templates(objects)["worker"])["name"] == KINDS["trainjob"].container == "node"
    with pytest.raises(ClusterError, match=r"calls muster's own container 'node'"):
        everything("trainjob", pod={"containers": [{"name": "node", "image": "x"}]})


def test_the_time_to_live_has_a_default_and_may_be_nothing() -> None:
    (made,) = manifests(job())
    assert made["spec"]["ttlSecondsAfterFinished"] == 600
    assert "activeDeadlineSeconds" not in made["spec"]
    assert manifests(job(ttl_s=0))[0]["spec"]["ttlSecondsAfterFinished"] == 0


# ------------------------------------------------------------------------------------------------ what cannot


@pytest.mark.parametrize(
    ("pod", "said"),
    [
        ({"metadata": {"annotations": {"muster/recipe": "x"}}}, "changes the annotation muster/recipe"),
        ({"metadata": {"annotations": {"$patch": "replace"}}}, "changes the annotation muster/recipe"),
        ({"metadata": None}, "changes the annotation muster/recipe"),
        ({"volumes": [{"name": "recipe", "emptyDir": {}}]}, "changes the volume recipe"),
        ({"volumes": [{"$patch": "replace"}]}, "changes the volume recipe"),
        ({"containers": [MUSTER | {"volumeMounts": [{"mountPath": "/etc/muster", "name": "x"}]}]}, "the mount of the"),
        ({"containers": [MUSTER | {"volumeMounts": None}]}, "changes the mount of the recipe"),
        ({"containers": [MUSTER | {"env": [{"$patch": "replace"}]}]}, "changes the variable MUSTER_"),
        ({"containers": [MUSTER | {"env": [{"name": "RAY_AUTH_MODE", "value": "disabled"}]}]}, "RAY_AUTH_MODE"),
        ({"containers": [{"$patch": "delete", "name": "muster"}]}, "changes the container muster"),
        ({"containers": None}, "changes the container muster"),
        ({"containers": [{"name": "ray-worker"}]}, "'ray-worker' is a new container and has no image; .* 'muster'"),
        ({"spec": {}, "hostNetwork": True}, r"pod\.hostNetwork: stands beside `spec`"),
        ({"spec": []}, r"pod\.spec: expected a mapping"),
        ({"spec": {"volumes": {}}}, r"pod\.spec\.volumes: expected a list"),
        ({"metadata": {"labels": {"a": 1}}}, r"pod\.metadata\.labels\.a: expected a text, got 1"),
        ({"containers": {}}, r"pod\.containers: expected a list, got a mapping"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_what_the_run_needs_is_kept(kind: str, pod: dict[str, Any], said: str) -> None:
    with pytest.raises(ClusterError, match=said) as caught:
        manifests(job(workers=(4, 4), kind=kind, pod=pod))
    assert str(caught.value).startswith("cluster.kubernetes.pod")
    assert caught.value.usage


@pytest.mark.parametrize("kind", ["jobset", "trainjob"])
def test_the_arguments_of_torchrun_are_kept(kind: str) -> None:
    with pytest.raises(ClusterError, match="the arguments of"):
        manifests(job(kind=kind, pod={"containers": [MUSTER | {"args": ["-m", "other"]}]}))
    made = manifests(job(kind=kind, pod={"containers": [MUSTER | {"command": ["numactl", "torchrun"]}]}))
    assert main(templates(made)["worker"])["command"] == ["numactl", "torchrun"]
    with pytest.raises(ClusterError, match=r"has no head for cluster\.kubernetes\.head_pod"):
        manifests(job(kind=kind, head_pod=HEAD))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"name": "other"}, "changes the name"),
        ({"namespace": "other"}, "namespace"),
        ({"annotations": {"muster/run-uri": "s3://other"}}, "by which muster knows"),
        ({"annotations": None}, "by which muster knows"),
        ({"labels": ["a"]}, r"metadata\.labels: expected a mapping, got a list"),
        ({"label": {"a": "b"}}, r"metadata\.label: there is no such field; did you mean 'labels'\?"),
    ],
)
def test_a_job_keeps_its_name_and_its_run(kind: str, metadata: dict[str, Any], said: str) -> None:
    with pytest.raises(ClusterError, match=said):
        manifests(job(kind=kind, metadata=metadata))


# ------------------------------------------------------------------------------------------------ the model cache


@pytest.mark.parametrize("kind", KINDS)
def test_a_claim_holds_the_models_of_every_pod_that_loads_them(kind: str) -> None:
    found = templates(manifests(job(kind=kind, model_cache="models")))
    submitter = found.pop("submitter", None)
    assert submitter is None or "volumes" not in submitter["spec"]
    for template in found.values():
        volume = named(template["spec"]["volumes"])["model-cache"]
        assert volume["persistentVolumeClaim"] == {"claimName": "models"}
        mount = named(main(template)["volumeMounts"])["model-cache"]["mountPath"]
        variables = {item["name"]: item.get("value", "") for item in main(template)["env"]}
        assert variables["HF_HUB_CACHE"].startswith(f"{mount}/")
        assert variables["MUSTER_CACHE"].startswith(f"{mount}/")
        assert template["spec"]["securityContext"]["fsGroup"] == CACHE_GROUP
    assert f"--uid {CACHE_GROUP} " in (ROOT / "cluster/kubernetes/Dockerfile").read_text()


# ------------------------------------------------------------------------------------------------ pod security


def specs(objects: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for role, template in templates(objects).items():
        yield role, template["spec"]
    options = objects[-1]["spec"].get("rayClusterSpec", {}).get("autoscalerOptions")
    if options:  # KubeRay puts this container into the head's pod
        head = templates(objects)["head"]["spec"]
        yield "autoscaler", head | {"containers": [{"name": "autoscaler", **options}]}


@pytest.mark.parametrize("given", [{}, {"model_cache": "models", "secrets": ["s3"]}, {"ray_auth": "disabled"}])
@pytest.mark.parametrize("kind", KINDS)
def test_every_pod_is_admitted_under_restricted(kind: str, given: dict[str, Any]) -> None:
    workers = (2, 4) if kind == "rayjob" else (4, 4)
    found = dict(specs(manifests(job(workers=workers, kind=kind, **given))))
    assert ("submitter" in found, "autoscaler" in found) == (kind == "rayjob", kind == "rayjob")
    assert {role: violations(spec) for role, spec in found.items()} == {role: [] for role in found}


@pytest.mark.parametrize(
    ("patch", "said"),
    [
        ({"hostNetwork": True}, "hostNetwork"),
        ({"securityContext": {"runAsNonRoot": None}}, "muster: runAsNonRoot"),
        ({"securityContext": {"seccompProfile": {"type": "Unconfined"}}}, "muster: seccompProfile"),
        ({"securityContext": {"runAsUser": 0}}, "pod: runAsUser"),
        ({"volumes": [{"name": "disk", "hostPath": {"path": "/"}}]}, "volume disk: hostPath"),
        ({"containers": [MUSTER | {"securityContext": {"privileged": True}}]}, "muster: privileged"),
        (
            {"containers": [MUSTER | {"securityContext": {"allowPrivilegeEscalation": None}}]},
            "muster: allowPrivilegeEscalation",
        ),
        ({"containers": [MUSTER | {"securityContext": {"capabilities": {"add": ["IPC_LOCK"]}}}]}, "capabilities"),
        ({"initContainers": [{"name": "x", "image": "y"}]}, "x: allowPrivilegeEscalation"),
    ],
)  # fmt: skip
def test_the_check_of_restricted_sees_what_breaks_it(patch: dict[str, Any], said: str) -> None:
    found = violations(templates(manifests(job(pod=patch)))["worker"]["spec"])
    assert any(said in violation for violation in found)


# ------------------------------------------------------------------------------------------------ the real schemas


def test_the_check_by_definitions_sees_what_they_refuse() -> None:
    size = {"x-kubernetes-int-or-string": True}
    entry = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}, "size": size}}
    entries = {"type": "array", "items": entry, "x-kubernetes-list-map-keys": ["name"]}
    schema = {"type": "object", "properties": {"entries": entries, "count": {"type": "integer", "minimum": 1}}}
    made = {"apiVersion": "v1", "count": 1, "entries": [{"name": "a", "size": 1}, {"name": "b", "size": "1Gi"}]}
    assert list(refused(made, schema)) == []
    for change, said in [
        ({"counts": 1}, ".counts: unknown field"),
        ({"count": 0}, ".count: 0 is out of bounds"),
        ({"count": "1"}, ".count: '1' is no integer"),
        ({"entries": [{"name": "a"}, {"name": "a"}]}, ".entries: ('a',) is given twice"),
        ({"entries": [{"size": 1}]}, ".entries[0]: name is missing"),
        ({"entries": [{"name": "a", "size": []}]}, ".entries[0].size: [] is neither a number nor a text"),
    ]:
        assert said in list(refused(made | change, schema))


@pytest.mark.parametrize("kind", KINDS)
def test_the_real_definitions_take_every_object(kind: str) -> None:
    schemas = crds()
    if not schemas:
        pytest.skip(f"{VARIABLE} names no folder with CustomResourceDefinitions")
    for given in ({}, EVERYTHING | {"queue": "team"}):
        for made in manifests(job(workers=(4, 4), kind=kind, **given)):
            if (made["apiVersion"], made["kind"]) not in schemas:
                pytest.skip(f"{VARIABLE} has no {made['kind']}")
            assert list(refused(made, schemas[made["apiVersion"], made["kind"]])) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_cluster_takes_it(kind: str) -> None:
    namespace = os.environ.get("MUSTER_TEST_NAMESPACE")
    if not namespace or not shutil.which("kubectl"):
        pytest.skip("MUSTER_TEST_NAMESPACE names no namespace of a cluster for `kubectl create --dry-run=server`")
    # A TrainJob itself is refused while its runtime does not exist.
    made = manifests(job(workers=(4, 4), kind=kind, namespace=namespace))[0]
    done = subprocess.run(
        ["kubectl", "create", "--dry-run=server", "--filename=-"],
        input=yaml.safe_dump(made), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


DOCUMENTED = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/clusters/kubernetes.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("block", [block for block in DOCUMENTED if block.startswith("cluster:")])
def test_what_the_page_shows_is_rendered(block: str) -> None:
    given = yaml.safe_load(block)["cluster"]["kubernetes"]
    (made,) = manifests(job(workers=(4, 4), **given))
    for template in templates([made]).values():
        patch = given.get("pod", {})
        assert template["spec"].get("priorityClassName") == patch.get("priorityClassName")
        assert template.get("metadata", {}).get("labels") == patch.get("metadata", {}).get("labels")
    if schemas := crds():
        assert list(refused(made, schemas["ray.io/v1", "RayJob"])) == []


@pytest.mark.parametrize("kind", KINDS)
def test_everything_is_rendered_as_it_is(kind: str) -> None:
    head = {"head_pod": HEAD} if kind == "rayjob" else {}
    text = Kubernetes().render(job(workers=(4, 4), kind=kind, **(EVERYTHING | head)))
    assert list(yaml.safe_load_all(text)) == everything(kind)
