"""The comparison of evaluations: the better value, the count without an improvement, and what a record holds of it."""

from __future__ import annotations

import math
from typing import Any

import pytest

from trainer.parsing import Malformed
from trainer.recipe import TrainingSection
from trainer.recipe.sections.training import EarlyStopSection
from trainer.recipe.tasks import Better
from trainer.run.best import (
    Best,
    Patience,
    better_of,
    chosen_by,
    ended_early,
    improves,
    is_over,
    read_best,
    to_state,
    value_of,
    waited,
)
from trainer.run.metrics import EvalMetrics


def evaluation(step: int, loss: float | None, **task: float) -> EvalMetrics:
    return EvalMetrics(step=step, eval_loss=loss, task=task, eval_tokens=1, eval_target_tokens=1, eval_s=0.1)


def length(patience: int | None, metric: str = "eval_loss") -> TrainingSection:
    stop = None if patience is None else EarlyStopSection(metric=metric, patience=patience)
    return TrainingSection(steps=10, global_batch=1, micro_batch=1, early_stop=stop)


@pytest.mark.parametrize(
    ("value", "before", "better", "by", "expected"),
    [
        (1.0, 2.0, "min", 0.0, True),
        (2.0, 1.0, "min", 0.0, False),
        (2.0, 1.0, "max", 0.0, True),
        (1.0, 1.0, "min", 0.0, False),
        (1.0, 1.0, "max", 0.0, False),
        (1.0, 1.25, "min", 0.25, False),
        (1.0, 1.5, "min", 0.25, True),
        (-1.0, -1.5, "max", 0.25, True),
        (1.0, None, "min", 9.0, True),
        (None, 1.0, "min", 0.0, False),
        (None, None, "max", 0.0, False),
    ],
)
def test_an_improvement_is_more_than_the_least(
    value: float | None, before: float | None, better: Better, by: float, expected: bool
) -> None:
    assert improves(value, before, better, by) is expected


def test_of_equal_values_the_earlier_one_is_the_best() -> None:
    one, two = Best("eval_loss", 1.5, 4, 1), Best("eval_loss", 1.5, 6, 1)
    assert better_of(one, two, "min") == better_of(one, two, "max") == one
    assert better_of(None, two, "min") == two
    assert better_of(one, None, "min") == one
    assert better_of(one, Best("eval_f1", 0.1, 8, 1), "max").step == 8  # type: ignore[union-attr]


def test_a_value_is_found_by_its_stored_name_and_is_finite() -> None:
    assert value_of(evaluation(1, 2.5, eval_f1=0.5), "eval_loss") == 2.5
    assert value_of(evaluation(1, 2.5, eval_f1=0.5), "eval_f1") == 0.5
    for loss in (None, math.nan, math.inf):
        assert value_of(evaluation(1, loss), "eval_loss") is None
    assert value_of(evaluation(1, 2.5), "eval_f1") is None


def test_the_count_begins_again_with_each_improvement() -> None:
    found, count = [], Patience("eval_loss")
    for step, value in enumerate([None, 2.0, 1.9, 1.5, None, 1.4, 1.0], start=1):
        count = waited(count, value, step, "min", 0.25)
        found.append((count.step, count.evaluations))
    assert found == [(None, 1), (2, 0), (2, 1), (4, 0), (4, 1), (4, 2), (7, 0)]


def test_small_improvements_that_add_up_end_the_patience() -> None:
    count = Patience("eval_loss", 2.0, 1)
    for step, value in ((2, 1.9), (3, 1.8), (4, 1.7)):
        count = waited(count, value, step, "min", 0.25)
    assert count == Patience("eval_loss", 1.7, 4, 0)


@pytest.mark.parametrize(
    ("patience", "metric", "expected"), [(2, "eval_loss", True), (3, "eval_loss", False), (2, "eval_f1", False)]
)
def test_the_recipe_of_now_decides_whether_a_run_is_over(patience: int, metric: str, expected: bool) -> None:
    count = Patience("eval_loss", 2.0, 4, 2)
    section = length(patience, metric)
    assert is_over(count, section.early_stop) is expected
    state = to_state(None, count, over=True)
    assert (ended_early(state, section) is not None) is expected
    assert ended_early(state) == count
    assert ended_early(state, length(None)) is None
    assert ended_early(to_state(None, count, over=False), section) is None


def test_a_state_of_an_older_version_has_none_of_it() -> None:
    assert to_state(None, None, over=False) == {}
    assert read_best({}) is chosen_by({}) is ended_early({}) is None


def test_a_record_is_chosen_by_its_own_evaluation() -> None:
    state = to_state(Best("eval_loss", 1.5, 4, 1), None, over=False)
    assert chosen_by({**state, "facts": {"step": 4}}) == Best("eval_loss", 1.5, 4, 1)
    assert chosen_by({**state, "facts": {"step": 6}}) is None


@pytest.mark.parametrize("best", [7, {"metric": "eval_loss"}, {"metric": "m", "value": "1", "step": 1, "attempt": 1}])
def test_a_state_that_muster_did_not_write_is_refused(best: Any) -> None:
    with pytest.raises(Malformed):
        read_best({"best": best})


def test_the_reason_is_a_sentence() -> None:
    assert (
        str(Patience("eval_loss", 1.5, 4, 1))
        == "eval_loss has not improved in 1 evaluation; it was 1.5000 after step 4"
    )
    assert str(Patience("eval_f1", None, None, 3)) == "eval_f1 has not improved in 3 evaluations"
