"""Rows of steps and evaluations and back, whatever version wrote them."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any, get_type_hints

import pytest

from tests.support.filled import filled, wrong_for
from tests.unit.trainer.run.test_malformed_run import EVALUATION, METRICS
from trainer.parsing import Malformed
from trainer.run.jsonl import plain
from trainer.run.metrics import NOT_IN_FACTS, EvalMetrics, StepMetrics, read_metrics_row

Kind = type[StepMetrics] | type[EvalMetrics]
KINDS: list[Kind] = [StepMetrics, EvalMetrics]
FIRST = {StepMetrics: "loss", EvalMetrics: "eval_loss"}
TASK = {"accuracy": 0.5, "kl": 1.25}


def names(kind: Kind) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def stored(metrics: StepMetrics | EvalMetrics) -> dict[str, Any]:
    row: dict[str, Any] = json.loads(json.dumps(plain(metrics.to_row()), allow_nan=False))
    return row


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_read_as_it_was_written(kind: Kind) -> None:
    metrics = filled(kind, task=TASK)
    row = stored(metrics)
    at = names(kind).index("task")
    assert list(row) == [*names(kind)[:at], *TASK, *names(kind)[at + 1 :]]
    assert type(read_metrics_row(row)) is kind
    assert read_metrics_row(row) == metrics


@pytest.mark.parametrize("kind", KINDS)
def test_an_old_row_lacks_fields_and_is_read(kind: Kind) -> None:
    row = {"step": 3, FIRST[kind]: 1.5}
    metrics = read_metrics_row(row)
    assert type(metrics) is kind
    assert {name: getattr(metrics, name) for name in names(kind) if getattr(metrics, name)} == row
    assert metrics.seconds == metrics.blocked_s == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_fields_that_are_not_known_are_kept(kind: Kind) -> None:
    row = {**stored(filled(kind, task={})), "mood": {"a": [1]}, "task": "a name that is taken"}
    metrics = read_metrics_row(row)
    assert metrics.task == {"mood": {"a": [1]}}
    assert metrics.to_row()["mood"] == {"a": [1]}


@pytest.mark.parametrize(("kind", "field"), [(kind, name) for kind in KINDS for name in names(kind) if name != "task"])
def test_a_field_of_another_type_was_not_written_by_muster(kind: Kind, field: str) -> None:
    row = {**stored(filled(kind, task=TASK)), field: wrong_for(get_type_hints(kind)[field])}
    with pytest.raises(Malformed, match=rf"^{field} is "):
        read_metrics_row(row)


@pytest.mark.parametrize("name", ["step", "attempt", "time"])
@pytest.mark.parametrize("value", [None, -1, True])
def test_the_place_of_a_row_is_never_null(name: str, value: Any) -> None:
    with pytest.raises(Malformed, match=rf"^{name} is "):
        read_metrics_row({"step": 1, "loss": 2.0, name: value})


@pytest.mark.parametrize("row", [{}, {"loss": 1.0}, [], None, 3, "loss"])
def test_a_row_without_a_step_is_none(row: Any) -> None:
    with pytest.raises(Malformed):
        read_metrics_row(row)


def test_the_names_that_runs_have_stored_are_those_of_the_fields() -> None:
    assert METRICS.keys() <= set(names(StepMetrics))
    assert EVALUATION.keys() - {"world_size"} <= set(names(EvalMetrics))


def test_a_loss_that_is_not_finite_is_still_that_of_a_step() -> None:
    row = stored(filled(StepMetrics, task={"reward": math.nan}, loss=math.nan, grad_norm=math.inf))
    assert (row["loss"], row["grad_norm"], row["reward"]) == (None, None, None)
    metrics = read_metrics_row(row)
    assert isinstance(metrics, StepMetrics)
    assert (metrics.loss, metrics.grad_norm, metrics.task) == (None, None, {"reward": None})


def test_what_was_not_measured_is_not_in_the_row() -> None:
    optional = [field.name for field in dataclasses.fields(StepMetrics) if field.default is None]
    assert {"mfu", "rank_s", "compile_s", "stall_s"} <= set(optional)
    row = filled(StepMetrics, task={}, **dict.fromkeys(optional)).to_row()
    assert row.keys().isdisjoint(optional)


def test_facts_are_what_was_learned_and_not_on_which_machines() -> None:
    facts = filled(StepMetrics, task=TASK).facts() | filled(EvalMetrics, task={"eval_accuracy": 0.5}).facts()
    assert facts.keys().isdisjoint(NOT_IN_FACTS)
    assert set(names(StepMetrics)) >= NOT_IN_FACTS
    assert {"step", "loss", "samples", "world_size", "eval_loss", "eval_accuracy", *TASK} <= facts.keys()
