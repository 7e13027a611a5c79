"""One trial of a sweep, with a driver that is played: what Ray Tune gets, and what is recorded."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.attempt import AttemptFailed
from launcher.driver.driver import Signals
from launcher.sweep import trial as module
from launcher.sweep.trial import CANCELLED, Trials
from tests.support.nodes import node
from trainer.errors import InputError, Interrupted, StartAgain, StorageError, WorkerFailed
from trainer.recipe import Recipe
from trainer.run import layout
from trainer.run.failure import Failure
from trainer.run.jsonl import JsonLinesWriter
from trainer.run.lease import Lease
from trainer.run.metrics import EvalMetrics, StepMetrics
from trainer.run.sweep import TrialRecord, change_trial, folder_of, read_trial, write_trial
from trainer.storage import Storage, open_storage

TOTAL = 40
Drive = Callable[[Recipe, Signals], None]


class Room:
    """A runner of a cluster with so many free CPUs."""

    def __init__(self, cpus: int) -> None:
        self._cpus = cpus

    def all_nodes(self) -> list[Any]:
        return [node(1, {"CPU": float(self._cpus)})]


class Sweep:
    """A sweep with one trial."""

    def __init__(self, folder: Path) -> None:
        self.storage = open_storage(str(folder / "runs"))
        self.folder = folder_of(self.storage, "toy")
        self.run: Storage = self.storage.child("toy-001")
        self.lease = Lease.acquire(self.folder)
        base = {
            "name": "toy",
            "model": {"path": "model"},
            "data": {"train": [{"path": "a", "format": "text"}], "eval_fraction": 0.1, "sequence_length": 64},
            "training": {"steps": TOTAL, "global_batch": 6, "micro_batch": 2, "eval_every": 10},
            "optimizer": {"name": "adamw", "lr": 5e-3},
            "storage": str(folder / "runs"),
            "sweep": {"parameters": {"adapter.rank": [2, 4]}},
        }
        self.trials = Trials(base["storage"], "toy", self.lease.driver, base, "eval_loss", 1)  # type: ignore[arg-type]
        write_trial(self.folder, TrialRecord(1, "toy-001", {"adapter.rank": 4}))
        self.attempt = 0

    def write(self, *steps: int, value: float | None = None) -> None:
        """Stores rows as an attempt does: those of training up to each evaluation, and the evaluation."""
        self.attempt += 1
        lines = JsonLinesWriter(self.run, layout.metrics_part(self.attempt), flush_s=0.01)
        for step in steps:
            lines.add(step_row(step).to_row())
            lines.add(eval_row(step, 10.0 - step / 10 if value is None else value).to_row())
        lines.close()

    def train(self, cpus: int = 4) -> Iterator[dict[str, Any]]:
        return self.trials.train(1, lambda recipe: Room(cpus))  # type: ignore[arg-type, return-value]

    @property
    def record(self) -> TrialRecord:
        found = read_trial(self.folder, 1)
        assert found is not None
        return found


def step_row(step: int) -> StepMetrics:
    nothing = dict.fromkeys(("lr", "grad_norm", "tokens", "target_tokens", "tokens_per_s", "tokens_per_s_per_worker"))
    others = {"step_s": 0.1, "world_size": 1, "samples": 1, "epoch": 0}
    return StepMetrics(step=step, total_steps=TOTAL, loss=1.0, **nothing, **others)  # type: ignore[arg-type]


def eval_row(step: int, value: float) -> EvalMetrics:
    return EvalMetrics(step=step, eval_loss=value, eval_tokens=1, eval_target_tokens=1, eval_s=0.1)


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sweep]:
    monkeypatch.setattr(module, "POLL_S", 0.05)
    found = Sweep(tmp_path)
    yield found
    found.lease.release("interrupted")


@pytest.fixture
def driven(monkeypatch: pytest.MonkeyPatch) -> Callable[[Drive], list[Recipe]]:
    """Puts a driver in the place of the real one; returns the recipes that it is called with."""

    def play(drive: Drive) -> list[Recipe]:
        recipes: list[Recipe] = []

        def run(recipe: Recipe, progress: Any, *, signals: Signals, runner: Any) -> str:
            recipes.append(recipe)
            drive(recipe, signals)
            return "adapter"

        monkeypatch.setattr(module, "drive", run)
        return recipes

    return play


def until_stopped(signals: Signals) -> None:
    for _ in range(600):
        if signals.stopped:
            raise Interrupted("stopped on request")
        threading.Event().wait(0.05)
    raise AssertionError("nobody has stopped the run")


def test_a_new_trial_gives_each_evaluation_and_the_last_one_with_its_end(sweep: Sweep, driven: Any) -> None:
    recipes = driven(lambda recipe, signals: sweep.write(10, 20, 30, 40))
    found = list(sweep.train())
    assert [(one.get("step"), one["done"]) for one in found] == [(10, False), (20, False), (30, False), (40, True)]
    assert found[-1]["value"] == 6.0
    assert sweep.record.state == "complete"
    assert sweep.record.step == TOTAL
    (recipe,) = recipes
    assert (recipe.name, recipe.adapter.rank, recipe.sweep) == ("toy-001", 4, None)


def test_a_trial_whose_run_was_never_frozen_is_trained(sweep: Sweep, driven: Any) -> None:
    """Its driver was killed between the trial's record and the run's recipe."""
    assert not sweep.run.list()
    recipes = driven(lambda recipe, signals: sweep.write(40))
    assert [one["done"] for one in sweep.train()] == [True]
    assert len(recipes) == 1


def test_resumed_it_replays_what_is_stored_and_repeats_no_evaluation(sweep: Sweep, driven: Any) -> None:
    sweep.write(10, 20, 30)

    def drive(recipe: Recipe, signals: Signals) -> None:
        sweep.write(20, 30, 40)  # from the checkpoint of step 10

    driven(drive)
    found = list(sweep.train())
    assert [(one["step"], one.get("replayed")) for one in found] == [(10, True), (20, True), (30, False), (40, None)]


@pytest.mark.parametrize("state", ["complete", "stopped", "stopping", "failed"])
def test_a_trial_that_has_ended_only_replays(sweep: Sweep, driven: Any, state: str) -> None:
    sweep.write(10, 20)
    change_trial(sweep.folder, 1, state=state, final=True)
    recipes = driven(lambda recipe, signals: None)
    first, last = sweep.train()
    assert (first["step"], first["replayed"], last["done"]) == (10, True, True)
    assert last.get("step") == (None if state == "failed" else 20)
    assert recipes == []
    assert sweep.record.state == {"stopping": "stopped"}.get(state, state)


def test_a_decision_of_the_rule_ends_the_run(sweep: Sweep, driven: Any) -> None:
    def drive(recipe: Recipe, signals: Signals) -> None:
        sweep.write(10)
        until_stopped(signals)

    driven(drive)
    results = sweep.train()
    assert next(results)["step"] == 10
    change_trial(sweep.folder, 1, state="stopping", step=10)
    assert list(results) == [{"step": 10, "value": 9.0, "done": True}]
    assert (sweep.record.state, sweep.record.step) == ("stopped", 10)


def test_a_decision_about_what_was_stored_begins_no_attempt(sweep: Sweep, driven: Any) -> None:
    sweep.write(10)
    recipes = driven(lambda recipe, signals: None)
    results = sweep.train()
    assert next(results)["replayed"] is False
    change_trial(sweep.folder, 1, state="stopping", step=10)
    assert next(results)["done"]
    assert recipes == []


def test_the_last_evaluation_of_a_run_is_never_judged(sweep: Sweep, driven: Any) -> None:
    """The driver was killed after the last step, before it had recorded the end."""
    sweep.write(30, 40)
    driven(lambda recipe, signals: None)
    assert [(one["step"], one["done"]) for one in sweep.train()] == [(30, False), (40, True)]


@pytest.mark.parametrize("newer", [False, True])
def test_the_end_of_the_sweep_ends_the_run_and_leaves_the_trial_open(sweep: Sweep, driven: Any, newer: bool) -> None:
    def drive(recipe: Recipe, signals: Signals) -> None:
        sweep.write(10)
        until_stopped(signals)

    driven(drive)
    results = sweep.train()
    next(results)
    if newer:  # another driver takes the sweep over
        Lease.acquire(sweep.folder, takeover=True).release("interrupted")
    else:
        sweep.lease.request_stop()
    assert list(results) == [{"done": True}]
    assert sweep.record.state == "running"


def test_a_run_that_was_cancelled_alone_counts_as_stopped(sweep: Sweep, driven: Any) -> None:
    def drive(recipe: Recipe, signals: Signals) -> None:
        sweep.write(10)
        raise Interrupted("stopped on request")

    driven(drive)
    assert list(sweep.train())[-1]["done"]
    assert (sweep.record.state, sweep.record.cause) == ("stopped", CANCELLED)


@pytest.mark.parametrize(
    ("cause", "final"),
    [
        (Failure("loss is nan", fatal=True), True),
        (Failure("rank 0 died", died=True), False),
        (Failure("a file is missing", fatal=True, usage=True), False),
        (None, False),
    ],
)
def test_a_failure_is_a_record_and_no_error(sweep: Sweep, driven: Any, cause: Failure | None, final: bool) -> None:
    def drive(recipe: Recipe, signals: Signals) -> None:
        if cause is None:
            raise InputError("no such model")
        raise WorkerFailed(cause.message) from AttemptFailed(cause)

    driven(drive)
    assert list(sweep.train()) == [{"done": True}]
    said = cause.message if cause else "no such model"
    assert (sweep.record.state, sweep.record.cause, sweep.record.final) == ("failed", said, final)


def test_a_trial_that_is_tried_again_runs(sweep: Sweep, driven: Any) -> None:
    """Its driver was killed, which was recorded as a failure, and Ray Tune has started it again."""
    change_trial(sweep.folder, 1, state="failed", cause="its driver: killed")
    states: list[tuple[str, str]] = []
    driven(lambda recipe, signals: states.append((sweep.record.state, sweep.record.cause)))
    list(sweep.train())
    assert states == [("running", "")]
    assert sweep.record.state == "complete"


def test_a_cluster_that_is_too_small_ends_the_sweep_to_be_started_again(sweep: Sweep, driven: Any) -> None:
    def drive(recipe: Recipe, signals: Signals) -> None:
        raise StartAgain("lost b: add nodes")

    driven(drive)
    assert list(sweep.train(cpus=0)) == [{"done": True, "again": "lost b: add nodes"}]
    assert sweep.record.state == "running"


def test_while_others_hold_the_places_it_waits(sweep: Sweep, driven: Any) -> None:
    calls = iter([StartAgain("others hold the rest"), None])

    def drive(recipe: Recipe, signals: Signals) -> None:
        if error := next(calls):
            raise error
        sweep.write(40)

    recipes = driven(drive)
    assert list(sweep.train())[-1]["done"]
    assert len(recipes) == 2
    assert sweep.record.state == "complete"


def test_values_that_are_not_finite_are_left_out(sweep: Sweep, driven: Any) -> None:
    driven(lambda recipe, signals: sweep.write(10, 40, value=float("nan")))
    assert list(sweep.train()) == [{"done": True}]


def test_a_storage_that_does_not_answer_for_a_while_costs_nothing(
    sweep: Sweep, driven: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    new, failed = module.Evaluations.new, []

    def flaky(self: module.Evaluations) -> Any:
        if len(failed) in (1, 2):
            failed.append(1)
            raise StorageError("no answer")
        failed.append(1)
        return new(self)

    def drive(recipe: Recipe, signals: Signals) -> None:
        sweep.write(10, 40)
        threading.Event().wait(0.5)

    monkeypatch.setattr(module.Evaluations, "new", flaky)
    driven(drive)
    assert [one["step"] for one in sweep.train()] == [10, 40]
    assert len(failed) > 3


def test_closed_it_has_ended_the_run(sweep: Sweep, driven: Any) -> None:
    ended = threading.Event()

    def drive(recipe: Recipe, signals: Signals) -> None:
        sweep.write(10)
        try:
            until_stopped(signals)
        finally:
            ended.set()

    driven(drive)
    results = sweep.train()
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert ended.is_set()
