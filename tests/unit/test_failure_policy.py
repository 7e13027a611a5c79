"""What Ray Train's controller is told about failures, without a Ray."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2.api.config import FailureConfig
from ray.train.v2.api.exceptions import WorkerGroupError

from launcher.causes import Failure
from launcher.environment import Environment
from launcher.training import FailurePolicy
from tests.support.training import run_of, small_recipe
from trainer import layout
from trainer.errors import CorruptObject, NonFiniteLoss
from trainer.recipe import Recipe
from trainer.reporter import JsonLines, read_rows
from trainer.worker import Job


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return small_recipe("a-run", tmp_path / "model", tmp_path, resources={"workers": 2, "max_failures": 99})


@pytest.fixture(autouse=True)
def back_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy goes to the driver's folder; the tests after these start commands in the project's."""
    monkeypatch.chdir(Path.cwd())


def policy(recipe: Recipe, folder: Path) -> FailurePolicy:
    config = FailureConfig(max_failures=recipe.resources.max_failures)
    return FailurePolicy(config, Job(recipe.storage, 1, recipe, 10, {}), Environment({}, str(folder)))


def failed(error: Exception) -> WorkerGroupError:
    return WorkerGroupError("a worker failed", {0: Failure.of(error, time.time(), 0, "host-a", "trace")})


def reach(recipe: Recipe, attempt: int, step: int) -> None:
    rows = JsonLines(run_of(recipe), layout.metrics_part(attempt))
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


def test_a_run_that_gets_on_is_restarted_as_often_as_the_recipe_allows(recipe: Recipe, tmp_path: Path) -> None:
    asked = policy(recipe, tmp_path)
    for attempt in range(1, 8):
        reach(recipe, attempt, attempt)
        assert asked.make_decision(failed(CorruptObject("block 3 is damaged"))) == FailureDecision.RETRY


def test_what_can_only_fail_again_is_not_tried_again(recipe: Recipe, tmp_path: Path) -> None:
    assert policy(recipe, tmp_path).make_decision(failed(NonFiniteLoss("step 3"))) == FailureDecision.RAISE
