"""What is rendered for Kubernetes: shapes, numbers, names, and that a recipe arrives as it left."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from cluster import cluster_of
from cluster.job import ClusterError
from cluster.kubernetes import Kubernetes
from cluster.kubernetes.kinds import KINDS, manifests
from cluster.kubernetes.names import JOBSET_LENGTH, RAYJOB_LENGTH, fitted
from cluster.kubernetes.pods import RECIPE_BYTES
from cluster.kubernetes.quantity import from_bytes, to_bytes
from cluster.ray_nodes import NODE_SETTINGS
from tests.support.kubernetes import RECIPE, job, manifest, mistakes
from trainer.recipe.sections.cluster import KubernetesSection

ROOT = Path(__file__).resolve().parents[3]
NASTY = "a: \"x\" 'y' `z`\n$(MUSTER_RAYJOB): $HOME  \n\t- é 😀\u2028\r\nend"
GIB = 2**30


def container(group: dict[str, Any]) -> dict[str, Any]:
    return group["template"]["spec"]["containers"][0]


def groups(made: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    cluster = made["spec"]["rayClusterSpec"]
    return cluster["headGroupSpec"], cluster["workerGroupSpecs"][0]


def environment(group: dict[str, Any]) -> dict[str, str]:
    return {item["name"]: item["value"] for item in container(group)["env"] if "value" in item}


def test_the_table_of_kinds_finds_it() -> None:
    assert isinstance(cluster_of("kubernetes"), Kubernetes)


SIZES = [("rayjob", (1, 1)), ("rayjob", (2, 7)), ("jobset", (4, 4)), ("trainjob", (4, 4))]


@pytest.mark.parametrize(("kind", "workers"), SIZES)
@pytest.mark.parametrize("gpus", [0, 2])
@pytest.mark.parametrize(("queue", "secrets"), [(None, ()), ("team", ("s3", "hub"))])
@pytest.mark.parametrize("name", ["gsm8k", '3B "Q"\n$(x)'])
def test_every_variant_keeps_to_the_schema(
    workers: tuple[int, int], gpus: int, queue: str | None, secrets: tuple[str, ...], name: str, kind: str
) -> None:
    given: dict[str, Any] = {
        "tolerations": [{"key": "spot", "operator": "Exists", "effect": "NoSchedule"}],
        "node_selector": {"on": "y", "pool": "1e3"},
        "service_account": "trainer",
        "namespace": "ml",
        "ttl_s": 0,
        "deadline_s": 60,
        "model_cache": "models",
    }
    wanted = job(name, workers, gpus, kind=kind, queue=queue, secrets=secrets, recipe=NASTY, **given)
    text = Kubernetes().render(wanted)
    documents = list(yaml.safe_load_all(text))
    assert [mistakes(document) for document in documents] == [[]] * len(documents)
    assert documents == manifests(wanted)
    assert documents[-1]["kind"].lower() == kind
    assert {document["metadata"]["name"] for document in documents} == {documents[-1]["metadata"]["name"]}


def test_a_recipe_can_name_every_kind_of_job() -> None:
    assert set(get_args(KubernetesSection.model_fields["kind"].annotation)) == set(KINDS)


Change = Callable[[dict[str, Any]], object]

BROKEN: list[tuple[str, Change]] = [
    ("minReplica", lambda made: groups(made)[1].update(minReplica=1)),
    ("replicas 9 is outside", lambda made: groups(made)[1].update(replicas=9)),
    ("terminationGracePeriodSeconds", lambda made: pod(made).update(terminationGracePeriodSeconds="120")),
    ("restartPolicy", lambda made: pod(made).update(restartPolicy="Always")),
    ("shutdownAfterJobFinishes", lambda made: made["spec"].update(shutdownAfterJobFinishes=False)),
    ("rayVersion", lambda made: made["spec"]["rayClusterSpec"].update(rayVersion="2.51.1")),
    ("env", lambda made: container(groups(made)[0])["env"].append({"name": "REDIS_PASSWORD", "value": "x"})),
    ("labels", lambda made: groups(made)[1]["rayStartParams"].update(labels="a=b")),
    ("containers", lambda made: pod(made).update(containers=[])),
    ("name", lambda made: made["metadata"].update(name="a.b")),
]


def pod(made: dict[str, Any]) -> dict[str, Any]:
    return groups(made)[0]["template"]["spec"]


@pytest.mark.parametrize(("named", "change"), BROKEN, ids=[named for named, _ in BROKEN])
def test_the_schema_names_what_the_cluster_would_refuse(named: str, change: Change) -> None:
    made = manifest(job())
    assert mistakes(made) == []
    change(made)
    assert any(named in mistake for mistake in mistakes(made)), mistakes(made)


def test_the_words_a_reader_looks_for_stand_there_as_they_are() -> None:
    text = Kubernetes().render(job(workers=(2, 8)))
    for word in ("minReplicas: 2", "maxReplicas: 8", "nvidia.com/gpu: '1'", "enableInTreeAutoscaling: true"):
        assert word in text


@pytest.mark.parametrize(
    ("workers", "per_pod", "queue", "expected"),
    [
        ((4, 4), 1, None, (4, 4, 4, False)),
        ((4, 8), 1, None, (4, 4, 8, True)),
        ((4, 8), 4, None, (1, 1, 2, True)),
        ((3, 5), 2, None, (2, 2, 3, True)),
        ((3, 4), 2, None, (2, 2, 2, False)),
        ((4, 8), 1, "team", (8, 4, 8, False)),
    ],
)
def test_workers_become_pods(
    workers: tuple[int, int], per_pod: int, queue: str | None, expected: tuple[int, int, int, bool]
) -> None:
    made = manifest(job(workers=workers, workers_per_pod=per_pod, queue=queue))
    group = groups(made)[1]
    elastic = made["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"], elastic) == expected
    assert ("autoscalerOptions" in made["spec"]["rayClusterSpec"]) == elastic


def test_a_pod_asks_for_all_of_its_workers() -> None:
    made = manifest(
        job(gpus=2, cpus=6, workers_per_pod=4, workers=(8, 8), memory_per_worker="10Gi", shared_memory="4Gi")
    )
    amounts = container(groups(made)[1])["resources"]
    assert amounts["requests"] == amounts["limits"] == {"cpu": "24", "memory": "44Gi", "nvidia.com/gpu": "8"}
    assert container(groups(made)[1])["volumeMounts"][0]["mountPath"] == "/dev/shm"
    assert groups(made)[1]["template"]["spec"]["volumes"][0]["emptyDir"] == {"medium": "Memory", "sizeLimit": "4Gi"}
    assert groups(made)[1]["rayStartParams"]["object-store-memory"] == str(2 * GIB)


def test_a_cpu_run_asks_for_no_gpu_and_another_resource_can_be_named() -> None:
    assert "gpu" not in Kubernetes().render(job(gpus=0))
    amounts = container(groups(manifest(job(gpus=1, gpu_resource="amd.com/gpu")))[1])["resources"]["limits"]
    assert amounts["amd.com/gpu"] == "1"
    assert "nvidia.com/gpu" not in amounts


def test_no_training_on_the_head_and_placement_is_the_workers_own() -> None:
    head, workers = groups(manifest(job(node_selector={"pool": "gpu"}, tolerations=[{"key": "spot"}])))
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert "nvidia.com/gpu" not in container(head)["resources"]["limits"]
    assert "nodeSelector" not in head["template"]["spec"]
    assert workers["template"]["spec"]["nodeSelector"] == {"pool": "gpu"}
    assert workers["template"]["spec"]["tolerations"] == [{"key": "spot"}]


def test_every_node_finds_out_soon_that_another_is_lost_and_the_driver_knows_its_rayjob() -> None:
    made = manifest(job(grace_s=90))
    for group in groups(made):
        assert environment(group).items() >= NODE_SETTINGS.items()
        assert environment(group)["MUSTER_RAYJOB"] == made["metadata"]["name"]
        assert group["template"]["spec"]["terminationGracePeriodSeconds"] == 90
    assert environment(groups(made)[0])["RAY_JOB_STOP_WAIT_TIME_S"] == "90"


def test_ray_is_closed_by_a_token_unless_told_otherwise() -> None:
    made = manifest(job())
    assert made["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    # The operator sets the variable together with the token; one of our own would win over it.
    assert "RAY_AUTH_MODE" not in environment(groups(made)[0])
    open_ = manifest(job(ray_auth="disabled"))
    assert "authOptions" not in open_["spec"]["rayClusterSpec"]
    submitter = {"template": open_["spec"]["submitterPodTemplate"]}
    assert {environment(group)["RAY_AUTH_MODE"] for group in (*groups(open_), submitter)} == {"disabled"}


def test_secrets_go_by_name_and_the_image_into_every_pod() -> None:
    made = manifest(job(secrets=("s3", "hub"), image="registry.example/muster@sha256:0", service_account="sa"))
    for group in groups(made):
        assert container(group)["envFrom"] == [{"secretRef": {"name": "s3"}}, {"secretRef": {"name": "hub"}}]
    for group in (*groups(made), {"template": made["spec"]["submitterPodTemplate"]}):
        assert container(group)["image"] == "registry.example/muster@sha256:0"
        assert group["template"]["spec"]["serviceAccountName"] == "sa"


def test_the_end_of_the_job_and_its_retries() -> None:
    spec = manifest(job(retries=5))["spec"]
    assert spec["backoffLimit"] == 5
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0
    assert "suspend" not in spec


@pytest.mark.parametrize("kind", KINDS)
def test_a_queue_suspends_the_job_until_it_is_admitted(kind: str) -> None:
    made = manifest(job(queue="team", kind=kind))
    assert made["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    assert made["spec"]["suspend"] is True


# ------------------------------------------------------------------------------------------------ the recipe


@pytest.mark.parametrize("recipe", [RECIPE, NASTY, "y", "null", "", "\n\n", " lead: 1\n", "x: |\n  $(A)\n\n\n"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_recipe_is_mounted_as_it_was(recipe: str, kind: str) -> None:
    objects = list(yaml.safe_load_all(Kubernetes().render(job(recipe=recipe, kind=kind))))
    made = objects[0]
    pod = groups(made)[0] if kind == "rayjob" else jobset_of(objects)["replicatedJobs"][0]["template"]["spec"]
    template = pod["template"]
    key = re.fullmatch(
        r"metadata\.annotations\['(.+)'\]",
        template["spec"]["volumes"][1]["downwardAPI"]["items"][0]["fieldRef"]["fieldPath"],
    )
    assert key is not None
    assert template["metadata"]["annotations"][key[1]] == recipe
    mount = next(m for m in container(pod)["volumeMounts"] if m["name"] == template["spec"]["volumes"][1]["name"])
    path = f"{mount['mountPath']}/{template['spec']['volumes'][1]['downwardAPI']['items'][0]['path']}"
    assert path == "/etc/muster/recipe.yaml"
    said = made["spec"]["entrypoint"] if kind == "rayjob" else container(pod)["args"][-1]
    assert said.endswith(path)


def test_nothing_of_the_run_stands_in_the_entrypoint() -> None:
    made = manifest(job("$(rm -rf /)`x`", recipe=NASTY, command=("run", "--takeover")))
    assert made["spec"]["entrypoint"] == "muster run --takeover /etc/muster/recipe.yaml"


@pytest.mark.parametrize("word", ["a b", "$HOME", "x;y", "'", ""])
def test_a_word_that_two_shells_would_read_differently_is_refused(word: str) -> None:
    with pytest.raises(ClusterError, match="entrypoint"):
        manifest(job(command=("run", word)))


def test_a_recipe_that_does_not_fit_is_refused() -> None:
    manifest(job(recipe="x" * RECIPE_BYTES))
    with pytest.raises(ClusterError, match="256 KiB"):
        manifest(job(recipe="é" * (RECIPE_BYTES // 2 + 1)))


def test_a_text_that_is_none_is_refused() -> None:
    with pytest.raises(ClusterError, match="surrogates not allowed"):
        Kubernetes().render(job(recipe="\ud800"))


# ------------------------------------------------------------------------------------------------ names and amounts


@pytest.mark.parametrize("length", [RAYJOB_LENGTH, JOBSET_LENGTH])
@pytest.mark.parametrize(
    "name", ["gsm8k", "3b", "Q", "x" * 99, "x" * 46 + "-y", "ü", "", "-", "a_b", "a.b", "\n", "run-x"]
)
def test_a_name_fits(name: str, length: int) -> None:
    made = fitted(name, length)
    assert len(made) <= length
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", made)


def test_names_stay_apart_and_stay_the_same() -> None:
    names = ["a-b", "a_b", "a.b", "A-b", "x" * 47, "x" * 48, "x" * 49, "3b", "run-3b", "", "-", "ü", "ä"]
    assert len({fitted(name, RAYJOB_LENGTH) for name in names}) == len(names)
    assert fitted("gsm8k-qlora", RAYJOB_LENGTH) == "gsm8k-qlora"
    assert fitted("x" * 47, RAYJOB_LENGTH) == "x" * 47
    # A name that is another's result does not become that other.
    assert fitted(fitted("A-b", RAYJOB_LENGTH), RAYJOB_LENGTH) != fitted("A-b", RAYJOB_LENGTH)


def test_the_longest_names_of_a_jobset_fit_into_dns() -> None:
    made = manifest(job("x" * 99, (9999, 9999), kind="jobset"))
    name, group = made["metadata"]["name"], made["spec"]["replicatedJobs"][0]["name"]
    assert len(f"{name}-{group}-0-9998-abcde") <= 63


@pytest.mark.parametrize(
    ("text", "size"), [("16Gi", 16 * GIB), ("500M", 500 * 10**6), ("1.5Gi", 3 * GIB // 2), ("7", 7), (".5Ki", 512)]
)
def test_amounts_of_memory(text: str, size: int) -> None:
    assert to_bytes(text, "x") == size
    assert to_bytes(from_bytes(size), "x") == size


@pytest.mark.parametrize("text", ["16GB", "0", "-1Gi", "lots", "1e3", "", "1 Gi", "\u0661Gi"])
def test_what_is_no_amount_is_refused(text: str) -> None:
    with pytest.raises(ClusterError, match="setting_x"):
        to_bytes(text, "setting_x")


def test_too_little_shared_memory_is_refused() -> None:
    with pytest.raises(ClusterError, match="at least 256Mi"):
        manifest(job(shared_memory="64Mi"))


def test_versions_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    made = manifest(job())
    assert made["spec"]["rayClusterSpec"]["rayVersion"] == pins["ray"]
    for wanted in (made, manifest(job(kind="jobset"))):
        images = set(re.findall(r"muster:[\w.]+", yaml.safe_dump(wanted)))
        assert images == {f"muster:{project['version']}"}


# ------------------------------------------------------------------------------------------------ JobSet


def jobset_of(objects: list[dict[str, Any]]) -> dict[str, Any]:
    spec = objects[0]["spec"]
    found: dict[str, Any] = spec["template"]["spec"] if objects[0]["kind"] == "TrainingRuntime" else spec
    return found


@pytest.mark.parametrize("kind", ["jobset", "trainjob"])
def test_torchrun_meets_at_the_first_pod_without_a_shell(kind: str) -> None:
    objects = manifests(job(workers=(8, 8), workers_per_pod=4, kind=kind, retries=7))
    spec = jobset_of(objects)
    indexed = spec["replicatedJobs"][0]["template"]["spec"]
    if kind == "trainjob":
        assert objects[0]["spec"]["mlPolicy"] == {"numNodes": 2}
    assert (indexed["completions"], indexed["parallelism"], indexed["backoffLimit"]) == (2, 2, 0)
    assert container(indexed)["command"] == ["torchrun"]
    assert container(indexed)["args"] == [
        "--nnodes", "2", "--nproc-per-node", "4", "--rdzv-id", "gsm8k", "--rdzv-backend", "c10d",
        "--rdzv-endpoint", "gsm8k-node-0-0.gsm8k:29400", "-m", "trainer", "/etc/muster/recipe.yaml",
    ]  # fmt: skip
    assert spec["network"]["subdomain"] == "gsm8k"
    assert spec["failurePolicy"]["maxRestarts"] == 7


def test_a_trainjob_keeps_to_the_rules_of_its_operator() -> None:
    """Its webhook wants one replica, this container and this label; the JobSet gets the TrainJob's name."""
    runtime, made = manifests(job(workers=(4, 4), kind="trainjob", namespace="ml"))
    (group,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert group["replicas"] == 1
    assert group["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    assert container(group["template"]["spec"])["name"] == "node"
    assert "suspend" not in runtime["spec"]["template"]["spec"]
    assert runtime["metadata"]["name"] == made["metadata"]["name"] == made["spec"]["runtimeRef"]["name"]
    assert runtime["metadata"]["namespace"] == made["metadata"]["namespace"] == "ml"
    assert runtime["metadata"]["annotations"] == made["metadata"]["annotations"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"workers": (2, 4)}, "set resources.workers=4"),
        ({"workers": (3, 3), "workers_per_pod": 2}, "do not fill pods of 2"),
        ({"command": ("doctor", "--json")}, "use kind: rayjob"),
    ],
)
@pytest.mark.parametrize("kind", ["jobset", "trainjob"])
def test_what_torchrun_cannot_do_is_said(kind: str, given: dict[str, Any], said: str) -> None:
    with pytest.raises(ClusterError, match=said) as caught:
        manifest(job(kind=kind, **given))
    assert f"kind: {kind}" in str(caught.value)


@pytest.mark.parametrize(
    ("workers", "servers", "gpus", "pods"),
    [((8, 8), 1, 4, 3), ((2, 8), 2, 2, 2), ((1, 1), 3, 3, 3)],
)
def test_pods_of_a_rayjob_hold_the_servers_too(workers: tuple[int, int], servers: int, gpus: int, pods: int) -> None:
    made = manifest(replace(job(workers=workers, workers_per_pod=4), servers=servers, gpus_per_server=gpus))
    assert groups(made)[1]["minReplicas"] == pods


def test_servers_that_fit_into_no_pod_or_have_no_ray_are_refused() -> None:
    with pytest.raises(
        ClusterError, match=r"takes 2 GPUs .* and a pod has 1: set cluster.kubernetes.workers_per_pod to 2"
    ):
        manifest(replace(job(), servers=1, gpus_per_server=2))
    for kind in ("jobset", "trainjob"):
        with pytest.raises(ClusterError, match=rf"Ray places them, and .*kind: {kind} runs torchrun"):
            manifest(replace(job(kind=kind), servers=1, gpus_per_server=1))
