"""How many workers an attempt gets, and what its failure means, without a Ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.attempt import AttemptFailed, ResizeRequested
from launcher.capacity import Node
from launcher.driver import attempts as module
from launcher.driver.attempts import PATIENCE_S, SETTLE_S, Attempts, WorkerCount
from launcher.raytrain.failures import first_cause
from tests.support.nodes import node
from tests.support.tasks import task_recipe
from tests.support.training import run_of, small_recipe
from trainer.checkpoint import claim_attempt, claim_driver
from trainer.errors import CorruptObject, MusterError, NonFiniteLoss, StartAgain, note_where
from trainer.recipe import Recipe, ResourcesSection
from trainer.run import layout
from trainer.run.events import BrokenEvent, HangEvent, StartEvent
from trainer.run.failure import Failure, WorkerError
from trainer.run.jsonl import Events, JsonLinesWriter, read_rows
from trainer.run.startup_phases import Phases
from trainer.worker.job import Job

Outcome = Exception | None


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return small_recipe("a-run", tmp_path / "model", tmp_path, resources={"workers": 2, "max_failures": 99})


class Played:
    """A runner whose attempts end at once, in these ways; ``before(number)`` is called before each ends."""

    def __init__(self, *outcomes: Outcome, before: Callable[[int], None] = lambda number: None) -> None:
        self.outcomes, self.before = list(outcomes), before
        self.started: list[int] = []
        self.asked: list[int] = []
        self.cluster: Sequence[Node] = [node(1, {"CPU": 8.0})]

    def nodes(self) -> Sequence[Node]:
        return self.cluster

    def ask_for(self, workers: int) -> None:
        self.asked.append(workers)

    def start(self, job: Job, workers: int) -> Any:
        self.started.append(workers)
        self.before(len(self.started))
        outcome = self.outcomes.pop(0)

        def result() -> None:
            if outcome is not None:
                raise outcome

        return SimpleNamespace(wait=lambda timeout_s: True, result=result)


def train(recipe: Recipe, runner: Played) -> None:
    Attempts(runner, Job(recipe.storage, 1, recipe, 10, {}), Phases(0.0)).run(lambda: None)


def failed(error: Exception) -> AttemptFailed:
    return AttemptFailed(first_cause({0: WorkerError.of(error, time.time(), 0, "host-a", "trace")}))


def failures(recipe: Recipe) -> list[dict[str, Any]]:
    rows = [e for e in read_rows(run_of(recipe), layout.EVENTS) if e["event"] == "failure"]
    return sorted(rows, key=lambda row: row["time"])


def reach(recipe: Recipe, attempt: int, step: int) -> None:
    rows = JsonLinesWriter(run_of(recipe), layout.metrics_part(attempt))
    rows.add({"attempt": attempt, "step": step, "loss": 1.0})
    rows.close()


def test_the_same_error_at_the_same_step_stops_the_run_the_third_time(recipe: Recipe) -> None:
    errors = [failed(CorruptObject(f"block 3 is damaged (attempt {attempt})")) for attempt in (1, 2, 3)]
    runner = Played(*errors, before=lambda number: reach(recipe, number, 7))
    with pytest.raises(MusterError, match="3 times in a row at step 7"):
        train(recipe, runner)
    told = failures(recipe)
    assert [(e["step"], e["retried"]) for e in told] == [(7, True), (7, True), (7, False)]
    assert told[-1]["cause"].endswith("(3 times in a row at step 7)")


def test_the_event_says_what_the_command_says(recipe: Recipe) -> None:
    """Whoever looks later has the stack and the advice, and the driver's last lines are the same."""
    broken = RuntimeError("CUDA error: device-side assert triggered")
    note_where(broken, "step 3, forward of micro-batch 1")
    with pytest.raises(MusterError) as last:
        train(recipe, Played(*[failed(broken)] * 3))
    told = failures(recipe)[0]
    assert (told["rank"], told["host"], told["phase"]) == (0, "host-a", "forward of micro-batch 1")
    assert (told["trace"], told["driver"], told["retried"]) == ("trace", 1, True)
    assert "CUDA_LAUNCH_BLOCKING=1" in told["advice"]
    assert last.value.cause == f"{told['cause']} (3 times in a row at step 0)"
    assert str(last.value) == f"{last.value.cause}\ntrace\n{told['advice']}"


def started(recipe: Recipe, attempt: int, hosts: list[str]) -> None:
    events = Events(run_of(recipe), attempt, "rank0")
    events.emit(StartEvent(step=0, hosts=tuple(hosts), strategy={"kind": "ddp"}))
    events.close()


def test_a_death_is_placed_on_the_host_of_its_own_group_alone(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = claim_driver(run_of(recipe), {})
    claim_attempt(run_of(recipe), driver, {})
    started(recipe, 1, ["old", "older"])
    waits: list[float] = []
    monkeypatch.setattr(module, "time", SimpleNamespace(time=time.time, monotonic=time.monotonic, sleep=waits.append))
    line = "RuntimeError: The actor died unexpectedly"
    dead = AttemptFailed(first_cause({1: RuntimeError("The actor died unexpectedly")}))

    def before(number: int) -> None:
        if number in (2, 4):
            claim_attempt(run_of(recipe), driver, {})
            started(recipe, 2 if number == 2 else 3, ["a", "b"])
        if number == 2:
            reach(recipe, 2, 4)
        if number == 4:
            events = Events(run_of(recipe), 3, "rank0")
            events.emit(
                BrokenEvent(seen={"0": "step 5, exchange of the loss", "1": "step 5, forward of micro-batch 1"})
            )
            events.close()

    with pytest.raises(MusterError):
        train(recipe, Played(dead, dead, dead, dead, before=before))
    first, second, third, fourth = (row["cause"] for row in failures(recipe))
    assert first == f"rank 1 died: {line}", "the start is of another driver's group"
    assert second == f"rank 1 on b died (after step 4): {line}"
    assert sum(waits) == 1.0, "and no longer"
    assert third.startswith(f"rank 1 died (after step 4): {line}"), "that group has failed; this one never started"
    assert fourth.startswith(f"rank 1 on b died (last seen at step 5, forward of micro-batch 1): {line}")


def test_a_run_that_makes_progress_is_restarted_as_often_as_the_recipe_allows(recipe: Recipe) -> None:
    errors = [failed(CorruptObject("block 3 is damaged"))] * 7
    runner = Played(*errors, None, before=lambda number: reach(recipe, number, number))
    train(recipe, runner)
    assert runner.started == [2] * 8


@pytest.mark.parametrize(("commits", "attempts"), [((0, 5, 5), 3), ((0, 0), 2)])
def test_failures_before_the_newest_checkpoint_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commits: tuple[int, ...], attempts: int
) -> None:
    recipe = small_recipe("a-run", tmp_path / "model", tmp_path, resources={"workers": 2, "max_failures": 1})
    committed = [0]
    monkeypatch.setattr(module, "list_commits", lambda run, newest: [SimpleNamespace(step=committed[0])])

    def before(number: int) -> None:
        reach(recipe, number, number)
        committed[0] = commits[number - 1]

    runner = Played(*[failed(CorruptObject("block 3 is damaged"))] * 9, before=before)
    with pytest.raises(MusterError):
        train(recipe, runner)
    assert len(runner.started) == attempts
    assert [row["retried"] for row in failures(recipe)] == [True] * (attempts - 1) + [False]


def test_workers_that_ended_for_a_resize_have_not_failed(recipe: Recipe) -> None:
    runner = Played(*[ResizeRequested("stopped after step 3")] * 5, None)
    train(recipe, runner)
    assert len(runner.started) == 6
    assert not read_rows(run_of(recipe), layout.EVENTS)


def test_a_start_that_fails_is_tried_three_times(recipe: Recipe) -> None:
    runner = Played(*[AttemptFailed(Failure(f"no room {n}"), starting=True) for n in "abcd"])
    with pytest.raises(MusterError, match="no room c"):
        train(recipe, runner)


def test_what_can_only_fail_again_is_not_tried_again(recipe: Recipe) -> None:
    runner = Played(failed(NonFiniteLoss("step 3")))
    with pytest.raises(MusterError, match="step 3"):
        train(recipe, runner)
    assert runner.started == [2]


def test_a_failure_is_none_of_a_run_that_is_complete(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of runs that are trained together one may have ended early, before its last step."""
    ended = recipe.model_copy(update={"name": "b-run"})
    record = SimpleNamespace(step=5, state={})
    monkeypatch.setattr(module, "list_commits", lambda run, newest: [record] if run.url.endswith("b-run") else [])
    monkeypatch.setattr(module, "is_last", lambda commit, length: commit is record)
    job = Job(recipe.storage, 1, recipe, 10, {}, others=(Job(recipe.storage, 1, ended, 10, {}),))
    with pytest.raises(MusterError, match="step 3"):
        Attempts(Played(failed(NonFiniteLoss("step 3"))), job, Phases(0.0)).run(lambda: None)
    assert len(failures(recipe)) == 1
    assert not failures(ended)


def test_a_hang_is_that_of_whichever_run_has_seen_it(recipe: Recipe) -> None:
    other = recipe.model_copy(update={"name": "b-run"})
    claim_attempt(run_of(other), claim_driver(run_of(other), {}), {})
    events = Events(run_of(other), 1, "rank0")
    events.emit(HangEvent(cause="nothing has moved for 30 s; held up by rank 1", ranks=()))
    events.close()
    job = Job(recipe.storage, 1, recipe, 10, {}, others=(Job(recipe.storage, 1, other, 10, {}),))
    dead = AttemptFailed(first_cause({1: RuntimeError("The actor died unexpectedly")}))
    with pytest.raises(MusterError, match="nothing has moved for 30 s"):
        Attempts(Played(dead, dead, dead), job, Phases(0.0)).run(lambda: None)


def test_an_error_of_the_driver_ends_the_wait(recipe: Recipe) -> None:
    runner = Played(None)
    runner.cluster = []

    def every() -> None:
        raise StartAgain("the nodes are lost")

    with pytest.raises(StartAgain, match="the nodes are lost"):
        Attempts(runner, Job(recipe.storage, 1, recipe, 10, {}), Phases(0.0)).run(every)
    assert runner.asked == [2]


def count(workers: Any, *nodes: Node, multiple: int = 1) -> Callable[[float], int | None]:
    decides = WorkerCount(ResourcesSection.model_validate({"workers": workers}), 100.0, multiple)
    return lambda after_s: decides.decide(nodes, 100.0 + after_s)


def test_an_attempt_has_as_many_workers_as_there_is_room_for() -> None:
    three = [node(n, {"CPU": 1.0}) for n in (1, 2, 3)]
    assert count([1, 2], *three)(0) == 2
    assert count([1, 9], *three)(0) == 3
    assert count(3, *three)(0) == 3
    assert count(4, *three)(0) is None


def test_ranks_that_compute_together_are_complete() -> None:
    five = [node(n, {"CPU": 1.0}) for n in range(5)]
    assert count([2, 8], *five, multiple=2)(0) == 4
    assert count([4, 8], *five, multiple=4)(0) == 4
    assert count([6, 8], *five, multiple=2)(0) is None


def test_what_just_ended_may_count_as_used_for_a_while() -> None:
    decide = count([1, 3], node(1, {"CPU": 1.0}), node(2, {"CPU": 1.0}, {"CPU": 0.0}))
    assert decide(0) is None
    assert decide(SETTLE_S - 0.1) is None
    assert decide(SETTLE_S) == 1, "others use it"


def test_a_cluster_that_others_use_is_not_waited_for_for_ever() -> None:
    decide = count(2, node(1, {"CPU": 2.0}, {"CPU": 1.0}))
    assert decide(PATIENCE_S - 1) is None
    with pytest.raises(StartAgain, match=r"room for 1 of 2 workers: other jobs hold"):
        decide(PATIENCE_S)


def test_servers_beside_the_workers_take_their_room_first(tiny_model: Path, tmp_path: Path) -> None:
    """Eight CPUs: two for each of the servers and of the workers; more nodes are asked for."""
    changes = {
        "rollout": {"engine": "vllm", "vllm": {"python": "/opt/vllm/bin/python", "servers": 2}},
        "resources": {"workers": [1, 4], "cpus_per_worker": 2},
    }
    runner = Played(None)
    train(task_recipe("grpo", "beside", tiny_model, tmp_path, **changes), runner)
    assert (runner.started, runner.asked) == ([2], [4])
