"""What Ray Train's controller is told about failures, without a Ray."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.scaling_policy import ResizeDecision
from ray.train.v2.api.config import FailureConfig
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from launcher.raytrain.environment import Environment
from launcher.raytrain.handoff import JobHandoff
from launcher.raytrain.nodes import Node
from launcher.raytrain.policies import FailurePolicy, NoRoom, ResizeRequested, WorkerCountPolicy, cause_of, gathered
from launcher.raytrain.trainer import scaling
from tests.support.nodes import node
from tests.support.training import run_of, small_recipe
from trainer.checkpoint import claim_attempt, claim_driver
from trainer.errors import CorruptObject, NonFiniteLoss, note_where
from trainer.recipe import Recipe, ResourcesSection
from trainer.run import layout
from trainer.run.events import BrokenEvent, StartEvent
from trainer.run.failure import WorkerError
from trainer.run.jsonl import Events, JsonLinesWriter, read_rows
from trainer.run.startup_phases import Phases
from trainer.worker.job import Job


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return small_recipe("a-run", tmp_path / "model", tmp_path, resources={"workers": 2, "max_failures": 99})


@pytest.fixture(autouse=True)
def back_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy goes to the driver's folder; the tests after these start commands in the project's."""
    monkeypatch.chdir(Path.cwd())


def policy(recipe: Recipe, folder: Path) -> FailurePolicy:
    config, order = FailureConfig(max_failures=recipe.resources.max_failures), JobHandoff(Phases(0.0))
    order.give(Job(recipe.storage, 1, recipe, 10, {}))
    return FailurePolicy(config, recipe, order, Environment({}, str(folder)))


def failed(error: Exception) -> WorkerGroupError:
    return WorkerGroupError("a worker failed", {0: WorkerError.of(error, time.time(), 0, "host-a", "trace")})


def reach(recipe: Recipe, attempt: int, step: int) -> None:
    rows = JsonLinesWriter(run_of(recipe), layout.metrics_part(attempt))
    rows.add({"attempt": attempt, "step": step, "loss": 1.0})
    rows.close()


def test_the_same_error_at_the_same_step_stops_the_run_the_third_time(recipe: Recipe, tmp_path: Path) -> None:
    asked = policy(recipe, tmp_path)
    decisions = []
    for attempt in (1, 2, 3):
        reach(recipe, attempt, 7)
        decisions.append(asked.make_decision(failed(CorruptObject(f"block 3 is damaged (attempt {attempt})"))))
    assert decisions == [FailureDecision.RETRY, FailureDecision.RETRY, FailureDecision.RAISE]
    told = [e for e in read_rows(run_of(recipe), layout.EVENTS) if e["event"] == "failure"]
    assert [(e["step"], e["retried"]) for e in told] == [(7, True), (7, True), (7, False)]
    assert told[-1]["cause"].endswith("(3 times in a row at step 7)")


def test_the_event_says_what_the_command_says(recipe: Recipe, tmp_path: Path) -> None:
    """Whoever looks later has the stack and the advice, and the driver's last lines are the same."""
    asked = policy(recipe, tmp_path)
    broken = RuntimeError("CUDA error: device-side assert triggered")
    note_where(broken, "step 3, forward of micro-batch 1")
    assert asked.make_decision(failed(broken)) == FailureDecision.RETRY
    (told,) = [e for e in read_rows(run_of(recipe), layout.EVENTS) if e["event"] == "failure"]
    assert (told["rank"], told["host"], told["phase"]) == (0, "host-a", "forward of micro-batch 1")
    assert (told["trace"], told["driver"], told["retried"]) == ("trace", 1, True)
    assert "CUDA_LAUNCH_BLOCKING=1" in told["advice"]
    assert asked._order.failed is None, "it goes on"
    for _ in range(2):
        asked.make_decision(failed(broken))
    last = asked._order.failed
    assert last is not None
    assert last.cause == f"{told['cause']} (3 times in a row at step 0)"
    assert str(last) == f"{last.cause}\ntrace\n{told['advice']}"


def started(recipe: Recipe, attempt: int, hosts: list[str]) -> None:
    events = Events(run_of(recipe), attempt, "rank0")
    events.emit(StartEvent(step=0, hosts=tuple(hosts), strategy={"kind": "ddp"}))
    events.close()


def test_a_death_is_placed_on_the_host_of_its_own_group_alone(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = claim_driver(run_of(recipe), {})
    claim_attempt(run_of(recipe), driver, {})
    started(recipe, 1, ["old", "older"])
    asked = policy(recipe, tmp_path)
    dead = WorkerGroupError("a worker failed", {1: RuntimeError("The actor died unexpectedly")})

    def told() -> str:
        asked.make_decision(dead)
        rows = [e for e in read_rows(run_of(recipe), layout.EVENTS) if e["event"] == "failure"]
        return str(max(rows, key=lambda e: e["time"])["cause"])

    line = "RuntimeError: The actor died unexpectedly"
    assert told() == f"rank 1 died: {line}", "the start is of another driver's group"
    claim_attempt(run_of(recipe), driver, {})
    started(recipe, 2, ["a", "b"])
    reach(recipe, 2, 4)
    waits: list[float] = []
    monkeypatch.setattr("launcher.raytrain.policies.time.sleep", waits.append)
    assert told() == f"rank 1 on b died (after step 4): {line}"
    assert sum(waits) == 1.0, "and no longer"
    assert told().startswith(f"rank 1 died (after step 4): {line}"), "that group has failed; this one never started"
    claim_attempt(run_of(recipe), driver, {})
    started(recipe, 3, ["a", "b"])
    events = Events(run_of(recipe), 3, "rank0")
    seen = {"0": "step 5, exchange of the loss", "1": "step 5, forward of micro-batch 1"}
    events.emit(BrokenEvent(seen=seen))
    events.close()
    assert told().startswith(f"rank 1 on b died (last seen at step 5, forward of micro-batch 1): {line}")


def test_a_run_that_gets_on_is_restarted_as_often_as_the_recipe_allows(recipe: Recipe, tmp_path: Path) -> None:
    asked = policy(recipe, tmp_path)
    for attempt in range(1, 8):
        reach(recipe, attempt, attempt)
        assert asked.make_decision(failed(CorruptObject("block 3 is damaged"))) == FailureDecision.RETRY


def test_failures_before_the_newest_checkpoint_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = small_recipe("a-run", tmp_path / "model", tmp_path, resources={"workers": 2, "max_failures": 1})
    asked, committed = policy(recipe, tmp_path), [0]
    monkeypatch.setattr("trainer.checkpoint.list_commits", lambda run, newest: [SimpleNamespace(step=committed[0])])
    decisions = []
    for attempt, step in enumerate((0, 5, 5, 5), 1):
        reach(recipe, attempt, attempt)
        committed[0] = step
        decisions.append(asked.make_decision(failed(CorruptObject("block 3 is damaged"))))
    retry, give_up = FailureDecision.RETRY, FailureDecision.RAISE
    assert decisions == [retry, retry, give_up, give_up]


def test_workers_that_were_gathered_anew_have_not_failed(recipe: Recipe, tmp_path: Path) -> None:
    asked = policy(recipe, tmp_path)
    for _ in range(5):
        ended = WorkerGroupError("ended", {0: UserExceptionWithTraceback(ResizeRequested("stopped after step 3"), "")})
        assert gathered(ended)
        assert asked.make_decision(ended) == FailureDecision.RETRY
    assert not read_rows(run_of(recipe), layout.EVENTS)
    assert not gathered(failed(CorruptObject("x")))


class Cluster:
    """A cluster and a clock that are played."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *nodes: Node) -> None:
        self.nodes, self.now = list(nodes), 100.0
        monkeypatch.setattr("launcher.raytrain.policies.nodes_of_cluster", lambda: self.nodes)
        monkeypatch.setattr("launcher.raytrain.policies.answering", lambda nodes: nodes)
        monkeypatch.setattr(
            "launcher.raytrain.policies.time", SimpleNamespace(monotonic=lambda: self.now, sleep=self.sleep)
        )

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def sizes(workers: Any, monkeypatch: pytest.MonkeyPatch) -> WorkerCountPolicy:
    monkeypatch.setattr(WorkerCountPolicy, "_ask_autoscaler", lambda self: None)
    resources = ResourcesSection.model_validate({"workers": workers})
    return WorkerCountPolicy(scaling(resources), resources)


def group_on(*nodes: str) -> Any:
    return SimpleNamespace(
        start_time=0.0, workers=[SimpleNamespace(metadata=SimpleNamespace(node_id=n)) for n in nodes]
    )


def size(decision: object) -> int | None:
    return decision.num_workers if isinstance(decision, ResizeDecision) else None


def test_ray_is_asked_for_what_the_recipe_says_of_places() -> None:
    asked = scaling(
        ResourcesSection.model_validate(
            {
                "workers": [1, 4],
                "gpus_per_worker": 2,
                "cpus_per_worker": 3,
                "placement": "spread",
                "accelerator_type": "A100",
                "labels": {"zone": "a"},
            }
        )
    )
    assert (asked.min_workers, asked.max_workers, asked.placement_strategy) == (1, 4, "SPREAD")
    assert asked._resources_per_worker_not_none == {"CPU": 3, "GPU": 2, "accelerator_type:A100": 0.001}
    assert asked._label_selector_per_worker(2) == [{"zone": "a"}] * 2


def test_a_group_has_as_many_workers_as_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    Cluster(monkeypatch, node(1, {"CPU": 1.0}), node(2, {"CPU": 1.0}), node(3, {"CPU": 1.0}))
    assert size(sizes([1, 2], monkeypatch).make_decision_for_non_running_worker_group()) == 2
    assert size(sizes([1, 9], monkeypatch).make_decision_for_non_running_worker_group()) == 3
    assert size(sizes(3, monkeypatch).make_decision_for_non_running_worker_group()) == 3
    assert size(sizes(4, monkeypatch).make_decision_for_non_running_worker_group()) is None


def test_after_a_loss_it_counts_its_own_places_and_not_those_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    full = {"CPU": 0.0}
    cluster = Cluster(
        monkeypatch, node(1, {"CPU": 1.0}, full), node(2, {"CPU": 1.0}, full), node(3, {"CPU": 1.0}, full)
    )
    asked = sizes([1, 3], monkeypatch)
    running = asked.make_decision_for_running_worker_group(group_on("n1", "n2"), None)  # type: ignore[arg-type]
    assert size(running) is None, "growth is the driver's to decide"
    cluster.nodes = cluster.nodes[1:]
    decisions = []
    while not decisions or decisions[-1] is None:
        decisions.append(size(asked.make_decision_for_non_running_worker_group()))
    assert decisions[-1] == 1, "n2 is ours, n3 somebody else's"
    assert WorkerCountPolicy.SETTLE_S <= cluster.now - 100.0 < WorkerCountPolicy.SETTLE_S + 1, (
        "what just ended may count as used"
    )
    assert size(asked.make_decision_for_non_running_worker_group()) is None, "the places are free now, or taken"


def test_a_cluster_that_others_use_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, node(1, {"CPU": 2.0}, {"CPU": 1.0}))
    asked = sizes(2, monkeypatch)

    def wait() -> None:
        while size(asked.make_decision_for_non_running_worker_group()) is None:
            pass

    with pytest.raises(NoRoom, match=r"room for 1 of 2 workers: other jobs hold"):
        wait()
    assert WorkerCountPolicy.PATIENCE_S <= cluster.now - 100.0 < WorkerCountPolicy.PATIENCE_S + 1
    assert cause_of(ControllerError(NoRoom("others use them"))).message == "others use them"


def test_a_head_that_does_not_answer_for_a_moment_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    Cluster(monkeypatch, node(1, {"CPU": 1.0}))
    answers = iter([ConnectionError("away"), [node(1, {"CPU": 1.0})]])

    def nodes() -> Any:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr("launcher.raytrain.policies.nodes_of_cluster", nodes)
    asked = sizes(1, monkeypatch)
    assert size(asked.make_decision_for_non_running_worker_group()) is None
    assert size(asked.make_decision_for_non_running_worker_group()) == 1


def test_what_can_only_fail_again_is_not_tried_again(recipe: Recipe, tmp_path: Path) -> None:
    assert policy(recipe, tmp_path).make_decision(failed(NonFiniteLoss("step 3"))) == FailureDecision.RAISE
