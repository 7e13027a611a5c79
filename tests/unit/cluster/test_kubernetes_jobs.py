"""Submitting, following and cancelling through `kubectl`, with a stand-in for it in PATH."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.job import ClusterError
from cluster.kubernetes import Kubernetes
from cluster.kubernetes.following import PATIENCE_S, POLL_S, Follower
from cluster.kubernetes.kinds import KINDS, manifests
from cluster.kubernetes.kubectl import Kubectl
from cluster.kubernetes.reading import waits_for
from tests.support.kubernetes import job, manifest, mistakes

STAND_IN = '''#!{python} -S
"""Writes its words and its standard input down, and answers with the next file for its verb and resource."""
import json, pathlib, sys
here = pathlib.Path(__file__).parent
words = [word for word in sys.argv[1:] if not word.startswith("--request-timeout")]
if words[0] == "--namespace":
    words = words[2:]
key = words[0] if words[0] in ("create", "logs") else "-".join(words[:2])
key = "dry-run" if "--dry-run=server" in words else key
stdin = "" if words[0] == "logs" else sys.stdin.read()
with (here / "calls").open("a") as calls:
    calls.write(json.dumps({{"argv": sys.argv[1:], "stdin": stdin}}) + "\\n")
answers = sorted(here.glob(key + ".*"), key=lambda path: int(path.name.split(".")[1]))
if not answers:
    sys.exit("no answer for " + key)
answer = json.loads(answers[0].read_text())
if len(answers) > 1:
    answers[0].unlink()
sys.stdout.write(answer["out"])
sys.stderr.write(answer["err"])
sys.exit(answer["code"])
'''


class StandIn:
    """`kubectl` as these tests want it: each answer is given once, the last one for ever."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        program = folder / "kubectl"
        program.write_text(STAND_IN.format(python=sys.executable))
        program.chmod(0o755)

    def answers(self, key: str, *outs: Any, err: str = "", code: int = 0) -> None:
        for out in outs:
            self._count += 1
            text = out if isinstance(out, str) else json.dumps(out)
            (self._folder / f"{key}.{self._count}").write_text(json.dumps({"out": text, "err": err, "code": code}))

    @property
    def calls(self) -> list[dict[str, Any]]:
        path = self._folder / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def called(self, verb: str) -> list[list[str]]:
        return [call["argv"] for call in self.calls if verb in call["argv"]]


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    monkeypatch.setenv("PATH", str(tmp_path))
    return StandIn(tmp_path)


def existing(state: str | None = None, job_status: str = "", message: str = "", **metadata: Any) -> dict[str, Any]:
    made = {"kind": "RayJob", "metadata": {"name": "gsm8k", "namespace": "ml", **metadata}}
    own = {"annotations": {"muster/run-uri": "s3://runs/gsm8k"}}
    made["metadata"] = own | made["metadata"]
    status = {"jobDeploymentStatus": state, "jobStatus": job_status, "message": message, "rayClusterName": "gsm8k-x"}
    return made | {"status": status if state else {}}


def overdue() -> dict[str, Any]:
    made = existing("Failed", "RUNNING", "The RayJob has passed the activeDeadlineSeconds")
    made["status"]["reason"] = "DeadlineExceeded"
    return made


def pods(*names: str, phase: str = "Running") -> dict[str, Any]:
    return {
        "items": [
            {"metadata": {"name": name, "creationTimestamp": f"2026-01-01T00:00:0{i}Z"}, "status": {"phase": phase}}
            for i, name in enumerate(names)
        ]
    }


# ------------------------------------------------------------------------------------------------ submit, state, cancel


def test_a_manifest_goes_in_on_standard_input(kubectl: StandIn) -> None:
    kubectl.answers("get-rayjob", "")
    kubectl.answers("create", existing())
    wanted = job(secrets=["s3"], recipe="name: secret-looking\n")
    assert Kubernetes().submit(wanted, "s3://runs/gsm8k/recipe.yaml") == "ml/gsm8k"
    create = next(call for call in kubectl.calls if "create" in call["argv"])
    assert yaml.safe_load(create["stdin"]) == manifest(wanted)
    assert "secret-looking" not in json.dumps([call["argv"] for call in kubectl.calls])
    assert not kubectl.called("delete")
    assert all("--request-timeout=20s" in call["argv"] for call in kubectl.calls)


def test_a_namespace_is_used_in_every_call(kubectl: StandIn) -> None:
    kubectl.answers("get-rayjob", "")
    kubectl.answers("create", existing())
    Kubernetes().submit(job(namespace="ml"), "")
    for call in kubectl.calls:
        assert call["argv"][1:3] == ["--namespace", "ml"]


@pytest.mark.parametrize(
    "old",
    [
        existing("Failed", "FAILED"),
        existing("Complete", "SUCCEEDED"),
        existing("ValidationFailed"),
        existing("Running", deletionTimestamp="2026-01-01T00:00:00Z"),
    ],
)
def test_a_job_that_has_ended_makes_room_for_the_same_run(old: dict[str, Any], kubectl: StandIn) -> None:
    kubectl.answers("get-rayjob", old)
    kubectl.answers("dry-run", existing())
    kubectl.answers("delete-rayjob", "")
    kubectl.answers("create", existing())
    assert Kubernetes().submit(job(), "") == "ml/gsm8k"
    tried, deleted, created = kubectl.calls[1:]
    assert {"create", "--dry-run=server"} <= set(tried["argv"])
    assert {"delete", "--wait=true", "--cascade=foreground"} <= set(deleted["argv"])
    assert "create" in created["argv"]
    assert "--dry-run=server" not in created["argv"]


@pytest.mark.parametrize("kind", ["rayjob", "jobset"])
def test_what_is_tried_is_the_job_under_a_free_name(kind: str, kubectl: StandIn) -> None:
    ended = {"jobDeploymentStatus": "Failed", "conditions": [{"type": "Failed", "status": "True"}]}
    kubectl.answers(f"get-{kind}", existing() | {"kind": {"jobset": "JobSet"}.get(kind), "status": ended})
    kubectl.answers("dry-run", existing())
    kubectl.answers(f"delete-{kind}", "")
    kubectl.answers("create", existing())
    wanted = job("x" * 99, kind=kind, run_uri="s3://runs/gsm8k")
    Kubernetes().submit(wanted, "")
    tried, created = (yaml.safe_load(call["stdin"]) for call in kubectl.calls if "create" in call["argv"])
    assert created == manifest(wanted)
    assert mistakes(tried) == []
    assert tried["metadata"]["name"] != created["metadata"]["name"]
    assert len(tried["metadata"]["name"]) <= len(created["metadata"]["name"])
    assert re.fullmatch(".*-[0-9a-f]{10}", tried["metadata"]["name"]), "a name that no run has by itself"


def test_an_ended_job_is_kept_if_the_new_one_is_refused(kubectl: StandIn) -> None:
    kubectl.answers("get-rayjob", existing("Failed"))
    kubectl.answers("dry-run", "", err='admission webhook "x" denied the request: spec.suspend is wrong', code=1)
    with pytest.raises(ClusterError, match=r"denied the request: spec\.suspend is wrong") as refused:
        Kubernetes().submit(job(), "")
    assert refused.value.usage
    assert not kubectl.called("delete")


@pytest.mark.parametrize(
    "error",
    [
        "exceeded quota: jobs, requested: 1, used: 1, limited: 1",
        'Error from server: admission webhook "w.example.org" does not support dry run',
        "error: the server does not support dry run",
        "error: rayjobs.ray.io doesn't support dry-run",
        'error: invalid argument "server" for "--dry-run" flag: strconv.ParseBool',
    ],
)
def test_a_quota_of_the_ended_job_and_a_dry_run_that_cannot_be_done_are_no_refusal(
    error: str, kubectl: StandIn
) -> None:
    kubectl.answers("get-rayjob", existing("Failed"))
    kubectl.answers("dry-run", "", err=error, code=1)
    kubectl.answers("delete-rayjob", "")
    kubectl.answers("create", existing())
    assert Kubernetes().submit(job(), "") == "ml/gsm8k"


@pytest.mark.parametrize("state", [None, "Initializing", "Running", "Retrying", "Suspended"])
def test_a_job_that_goes_on_is_left_alone(state: str | None, kubectl: StandIn) -> None:
    kubectl.answers("get-rayjob", existing(state))
    with pytest.raises(
        ClusterError, match=r"has not ended \(\w+\).*kubectl --namespace ml describe rayjob gsm8k"
    ) as refused:
        Kubernetes().submit(job(namespace="ml"), "")
    assert refused.value.usage
    assert "kubectl --namespace ml delete rayjob gsm8k" in str(refused.value)
    assert len(kubectl.calls) == 1


def test_another_run_of_that_name_is_left_alone(kubectl: StandIn) -> None:
    kubectl.answers("get-rayjob", existing("Failed"))
    with pytest.raises(ClusterError, match="belongs to another run"):
        Kubernetes().submit(job(run_uri="s3://elsewhere/gsm8k"), "")
    assert len(kubectl.calls) == 1


def test_without_kubectl_the_way_out_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ClusterError, match="muster render RECIPE --on kubernetes") as missing:
        Kubernetes().submit(job(), "")
    assert missing.value.usage


@pytest.mark.parametrize(
    ("said", "hint", "usage"),
    [
        ('no matches for kind "RayJob" in version "ray.io/v1"', "lacks the operator", True),
        ('strict decoding error: unknown field "spec.rayClusterSpec.authOptions"', "older than 1.5", True),
        ('strict decoding error: unknown field "spec.template.spec.imagePullSecret"', "misspelt in cluster", True),
        ("forbidden: User cannot create", "forbidden", True),
        ('The RayJob "x" is invalid: metadata.namespace: Invalid value: "ML"', 'Invalid value: "ML"', True),
        ("Unable to connect to the server: EOF", "EOF", False),
    ],
)
def test_what_the_cluster_refuses_is_passed_on(said: str, hint: str, usage: bool, kubectl: StandIn) -> None:
    kubectl.answers("get-rayjob", "")
    kubectl.answers("create", "", err=said, code=1)
    with pytest.raises(ClusterError, match=hint) as refused:
        Kubernetes().submit(job(), "")
    assert refused.value.usage is usage


@pytest.mark.parametrize(
    ("answer", "state"),
    [
        ("", None),
        (existing(), "Pending"),
        (existing("Running"), "Running"),
        (existing("Running", deletionTimestamp="2026"), "Terminating"),
    ],
)
def test_state(answer: Any, state: str | None, kubectl: StandIn) -> None:
    kubectl.answers("get-rayjob", answer)
    assert Kubernetes().state("ml/gsm8k") == state
    assert kubectl.calls[0]["argv"][1:3] == ["--namespace", "ml"]


def test_cancel_deletes_and_does_not_wait(kubectl: StandIn) -> None:
    kubectl.answers("get-jobset", existing())
    kubectl.answers("delete-jobset", "")
    Kubernetes().cancel("jobset:ml/gsm8k", "s3://runs/gsm8k")
    assert {"--ignore-not-found", "--wait=false"} <= set(kubectl.calls[-1]["argv"])


def test_cancel_leaves_a_job_of_that_name_to_the_run_that_it_is_of(kubectl: StandIn) -> None:
    kubectl.answers("get-rayjob", existing())
    Kubernetes().cancel("ml/gsm8k", "s3://old-runs/gsm8k")
    assert not kubectl.called("delete")


@pytest.mark.parametrize("job_id", ["", "pod:ml/x", "ml/", "trainjob:"])
def test_what_is_no_id_is_refused(job_id: str, kubectl: StandIn) -> None:
    with pytest.raises(ClusterError, match="names no job"):
        Kubernetes().state(job_id)


# ------------------------------------------------------------------------------------------------ follow


def follow(job_id: str = "ml/gsm8k") -> tuple[int, list[str], list[float]]:
    said: list[str] = []
    naps: list[float] = []
    return Kubernetes(naps.append).follow(job_id, said.append), said, naps


def lines(*numbers: int) -> str:
    return "".join(f"2026-01-01T00:00:0{n}.5Z line {n}\n" for n in numbers)


def test_lines_are_passed_on_once_though_the_stream_breaks(kubectl: StandIn) -> None:
    kubectl.answers("get-rayjob", *[existing("Running")] * 3, existing("Complete", "SUCCEEDED"))
    kubectl.answers("get-pods", pods("old", "new"))
    kubectl.answers("logs", lines(1, 2), lines(2, 3), lines(3, 4))
    code, said, _ = follow()
    assert code == 0
    assert [text for text in said if text.startswith("line")] == ["line 1", "line 2", "line 3", "line 4"]
    assert said[0] == "rayjob gsm8k: Running"
    first, second = kubectl.called("logs")[:2]
    assert first[-1] == "new"
    assert {"--follow", "--timestamps", "--container=muster", "--request-timeout=0"} <= set(first)
    assert "--since-time=2026-01-01T00:00:02.5Z" in second


FAILED = "Job entrypoint command failed with exit code {}, last available logs (truncated to 20,000 chars):\nx"


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (existing("Complete", "SUCCEEDED"), 0),
        (existing("Failed", "FAILED", FAILED.format(1)), 1),
        (existing("Failed", "FAILED", FAILED.format(2)), 2),
        (existing("Failed", "FAILED", FAILED.format(3)), 3),
        (existing("Failed", "FAILED", FAILED.format(-9)), 1),
        (existing("Failed", "FAILED", FAILED.format(139)), 1),
        (existing("Failed", "", "Job submission has failed."), 1),
        (existing("Complete", "STOPPED"), 3),
        (existing("ValidationFailed", "", "bad"), 2),
        (overdue(), 3),
        ("", 3),
    ],
)
def test_the_exit_code_is_the_drivers(end: Any, code: int, kubectl: StandIn) -> None:
    kubectl.answers("get-rayjob", existing("Running"), end)
    kubectl.answers("get-pods", pods())
    assert follow()[0] == code


def test_a_failure_is_said_without_the_lines_that_were_said_already(kubectl: StandIn) -> None:
    kubectl.answers("get-rayjob", existing("Failed", "FAILED", FAILED.format(1)))
    kubectl.answers("get-pods", pods("p", phase="Failed"))
    kubectl.answers("logs", lines(1))
    assert follow()[1] == ["rayjob gsm8k: Failed", "line 1", "Job entrypoint command failed with exit code 1"]


def test_why_pods_wait_is_said_once(kubectl: StandIn) -> None:
    no_room = {"type": "PodScheduled", "status": "False", "message": "0/3 nodes: Insufficient nvidia.com/gpu"}
    no_image = {"state": {"waiting": {"reason": "ErrImagePull", "message": "muster:0.1.0 not found"}}}
    waiting = {
        "items": [
            {"metadata": {"name": "a"}, "status": {"phase": "Pending", "conditions": [no_room]}},
            {"metadata": {"name": "b"}, "status": {"phase": "Pending", "conditions": [no_room]}},
            {"metadata": {"name": "c"}, "status": {"phase": "Pending", "containerStatuses": [no_image]}},
        ]
    }
    kubectl.answers("get-rayjob", *[existing("Initializing")] * 3, existing("Complete", "SUCCEEDED"))
    kubectl.answers("get-pods", waiting)
    _, said, naps = follow()
    reasons = [text for text in said if text.startswith("waiting for")]
    assert reasons == [
        "waiting for 2 pods: not scheduled: 0/3 nodes: Insufficient nvidia.com/gpu; "
        "1 pod: ErrImagePull: muster:0.1.0 not found"
    ]
    assert naps == [POLL_S] * 3


def test_a_cluster_that_is_away_is_asked_again(kubectl: StandIn) -> None:
    kubectl.answers("get-rayjob", "", "", err="Unable to connect to the server", code=1)
    kubectl.answers("get-rayjob", existing("Complete", "SUCCEEDED"))
    kubectl.answers("get-pods", pods())
    code, said, _ = follow()
    assert code == 0
    assert len([text for text in said if "trying again" in text]) == 1


class Away(Kubectl):
    def __init__(self) -> None:
        self.asked = 0

    def get(self, resource: str, name: str) -> None:
        self.asked += 1
        raise ClusterError("away", usage=False)


def test_patience_has_an_end() -> None:
    away = Away()
    with pytest.raises(ClusterError, match="away"):
        Follower(away, "rayjob", "x", lambda text: None, lambda seconds: None).follow()
    assert away.asked == PATIENCE_S / POLL_S + 1


def test_a_call_that_is_refused_is_not_tried_again(kubectl: StandIn) -> None:
    kubectl.answers("get-rayjob", "", err="forbidden", code=1)
    with pytest.raises(ClusterError, match="forbidden"):
        follow()
    assert len(kubectl.calls) == 1


def test_a_jobset_is_followed_by_its_first_pod(kubectl: StandIn) -> None:
    def jobset(**status: Any) -> dict[str, Any]:
        return {"kind": "JobSet", "metadata": {"name": "gsm8k"}, "status": status}

    done = {"type": "Failed", "status": "True", "message": "jobset failed due to max restarts"}
    kubectl.answers("get-jobset", jobset(replicatedJobsStatus=[{"active": 1}]), jobset(conditions=[done]))
    kubectl.answers("get-pods", pods("gsm8k-node-0-0-abcde"))
    kubectl.answers("logs", lines(1))
    code, said, _ = follow("jobset:gsm8k")
    assert code == 1
    assert said == ["jobset gsm8k: Running", "line 1", "jobset gsm8k: Failed", "jobset failed due to max restarts"]
    asked = json.dumps(kubectl.called("get"))
    assert "jobset.sigs.k8s.io/jobset-name=gsm8k,batch.kubernetes.io/job-completion-index=0" in asked


def test_pods_that_are_only_starting_are_no_news() -> None:
    starting = {"status": {"containerStatuses": [{"state": {"waiting": {"reason": "ContainerCreating"}}}]}}
    assert waits_for([starting, {}]) == []


@pytest.mark.parametrize(
    ("kind", "state"), [("Completed", "Completed"), ("Suspended", "Suspended"), ("Other", "Pending")]
)
def test_what_a_jobset_says(kind: str, state: str) -> None:
    made = {"kind": "JobSet", "metadata": {}, "status": {"conditions": [{"type": kind, "status": "True"}]}}
    assert KINDS["jobset"].reading(made).state == state


@pytest.mark.parametrize(
    ("kind", "reason", "code"),
    [
        ("jobset", "FailJobSetFailurePolicyAction", 3),
        ("jobset", "ReachedMaxRestarts", 1),
        ("trainjob", "DeadlineExceeded", 3),
        ("trainjob", "ReachedMaxRestarts", 1),
    ],
)
def test_a_job_that_its_deadline_ended_can_be_resumed(kind: str, reason: str, code: int) -> None:
    failed = {"type": "Failed", "status": "True", "reason": reason, "message": "why"}
    reading = KINDS[kind].reading({"metadata": {}, "status": {"conditions": [failed]}})
    assert (reading.state, reading.exit_code, reading.detail) == ("Failed", code, "why")


# ------------------------------------------------------------------------------------------------ TrainJob


def trainjob(*conditions: str, active: int = 0, run_uri: str = "s3://runs/gsm8k", **metadata: Any) -> dict[str, Any]:
    return {
        "kind": "TrainJob",
        "metadata": {"name": "gsm8k", "namespace": "ml", "annotations": {"muster/run-uri": run_uri}, **metadata},
        "status": {
            "conditions": [{"type": name, "status": "True"} for name in conditions],
            "jobsStatus": [{"name": "node", "active": active}],
        },
    }


def verbs(kubectl: StandIn) -> list[str]:
    """Returns what was called, in order: the verb, and the kind of object."""
    said = []
    for call in kubectl.calls:
        words = [word for word in call["argv"] if not word.startswith("--request-timeout")]
        words = words[2:] if words[0] == "--namespace" else words
        kind = yaml.safe_load(call["stdin"])["kind"].lower() if words[0] == "create" else words[1]
        said.append(("dry-run" if "--dry-run=server" in words else words[0]) + " " + kind)
    return said


BOTH = ["trainingruntime", "trainjob"]


def test_a_trainjob_is_created_after_its_runtime(kubectl: StandIn) -> None:
    kubectl.answers("get-trainjob", "")
    kubectl.answers("get-trainingruntime", "")
    kubectl.answers("create", trainjob())
    wanted = job(kind="trainjob")
    assert Kubernetes().submit(wanted, "") == "trainjob:ml/gsm8k"
    assert verbs(kubectl)[2:] == [f"create {kind}" for kind in BOTH]
    sent = [yaml.safe_load(call["stdin"]) for call in kubectl.calls if "create" in call["argv"]]
    assert sent == manifests(wanted)
    assert sent[1]["spec"]["runtimeRef"]["name"] == sent[0]["metadata"]["name"]


def test_an_ended_trainjob_goes_with_its_runtime_before_the_next(kubectl: StandIn) -> None:
    kubectl.answers("get-trainjob", trainjob("Failed"))
    kubectl.answers("get-trainingruntime", trainjob())
    kubectl.answers("dry-run", trainjob())
    kubectl.answers(
        "dry-run", "", err="specified trainingRuntime must be created before the TrainJob is created", code=1
    )
    kubectl.answers("delete-trainjob", "")
    kubectl.answers("delete-trainingruntime", "")
    kubectl.answers("create", trainjob())
    Kubernetes().submit(job(kind="trainjob"), "")
    assert verbs(kubectl)[2:] == [
        *(f"dry-run {kind}" for kind in BOTH),
        *("delete trainjob", "delete trainingruntime"),
        *(f"create {kind}" for kind in BOTH),
    ]


def test_a_runtime_that_is_left_over_goes_and_anothers_stays(kubectl: StandIn) -> None:
    kubectl.answers("get-trainjob", "")
    kubectl.answers("get-trainingruntime", trainjob(), trainjob(run_uri="s3://other/gsm8k"))
    kubectl.answers("delete-trainingruntime", "")
    kubectl.answers("create", trainjob())
    Kubernetes().submit(job(kind="trainjob"), "")
    assert "delete trainingruntime" in verbs(kubectl)
    with pytest.raises(ClusterError, match="trainingruntime gsm8k exists and belongs to another run"):
        Kubernetes().submit(job(kind="trainjob"), "")


def test_a_runtime_does_not_stay_when_its_trainjob_is_refused(kubectl: StandIn) -> None:
    kubectl.answers("get-trainjob", "")
    kubectl.answers("get-trainingruntime", "")
    kubectl.answers("create", trainjob())
    kubectl.answers("create", "", err="denied the request: no", code=1)
    kubectl.answers("delete-trainingruntime", "")
    with pytest.raises(ClusterError, match="denied the request: no"):
        Kubernetes().submit(job(kind="trainjob"), "")
    assert verbs(kubectl)[-1] == "delete trainingruntime"


def test_a_runtime_that_somebody_else_has_just_created_stays(kubectl: StandIn) -> None:
    kubectl.answers("get-trainjob", "")
    kubectl.answers("get-trainingruntime", "")
    kubectl.answers("create", "", err='trainingruntimes "gsm8k" already exists', code=1)
    with pytest.raises(ClusterError, match="already exists"):
        Kubernetes().submit(job(kind="trainjob"), "")
    assert verbs(kubectl)[-1] == "create trainingruntime"


def test_a_runtime_stays_when_nobody_knows_whether_its_trainjob_was_created(kubectl: StandIn) -> None:
    kubectl.answers("get-trainjob", "")
    kubectl.answers("get-trainingruntime", "")
    kubectl.answers("create", trainjob())
    kubectl.answers("create", "", err="net/http: TLS handshake timeout", code=1)
    with pytest.raises(ClusterError, match="handshake") as raised:
        Kubernetes().submit(job(kind="trainjob"), "")
    assert not raised.value.usage
    assert verbs(kubectl)[-1] == "create trainjob"


def test_a_trainjob_that_goes_on_is_left_alone(kubectl: StandIn) -> None:
    kubectl.answers("get-trainjob", trainjob(active=1))
    kubectl.answers("get-trainingruntime", trainjob())
    with pytest.raises(ClusterError, match=r"has not ended \(Running\).*delete trainjob,trainingruntime gsm8k"):
        Kubernetes().submit(job(kind="trainjob"), "")
    assert verbs(kubectl) == ["get trainjob", "get trainingruntime"]


def test_a_trainjob_is_cancelled_with_its_runtime(kubectl: StandIn) -> None:
    kubectl.answers("get-trainjob", trainjob())
    kubectl.answers("delete-trainjob", "")
    kubectl.answers("delete-trainingruntime", "")
    Kubernetes().cancel("trainjob:ml/gsm8k", "s3://runs/gsm8k")
    assert verbs(kubectl)[1:] == ["delete trainjob", "delete trainingruntime"]


@pytest.mark.parametrize(
    ("made", "state", "code"),
    [
        (trainjob(), "Pending", None),
        (trainjob(active=1), "Running", None),
        (trainjob("Suspended"), "Suspended", None),
        (trainjob("Complete"), "Complete", 0),
        (trainjob("Failed"), "Failed", 1),
        (trainjob(active=1, deletionTimestamp="2026"), "Terminating", None),
    ],
)
def test_what_a_trainjob_says(made: dict[str, Any], state: str, code: int | None, kubectl: StandIn) -> None:
    reading = KINDS["trainjob"].reading(made)
    assert (reading.state, reading.exit_code) == (state, code)
    kubectl.answers("get-trainjob", made)
    assert Kubernetes().state("trainjob:ml/gsm8k") == state


def test_a_trainjob_is_followed_by_the_first_pod_of_its_jobset(kubectl: StandIn) -> None:
    kubectl.answers("get-trainjob", trainjob(active=1), trainjob("Complete"))
    kubectl.answers("get-pods", pods("gsm8k-node-0-0-abcde"))
    kubectl.answers("logs", lines(1))
    code, said, _ = follow("trainjob:ml/gsm8k")
    assert (code, said) == (0, ["trainjob gsm8k: Running", "line 1", "trainjob gsm8k: Complete"])
    assert "jobset.sigs.k8s.io/jobset-name=gsm8k" in json.dumps(kubectl.called("get"))
    assert "--container=node" in kubectl.called("logs")[0]
