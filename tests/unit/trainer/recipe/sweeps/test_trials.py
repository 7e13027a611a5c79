"""A sweep's trials: what varies, which values a number has, and what is refused before anything starts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from launcher.testing.training import small_recipe
from trainer.errors import RecipeError
from trainer.recipe import loads
from trainer.recipe.sections.sweep import SweepSection
from trainer.recipe.sweeps.trials import (
    as_text,
    best_recipe,
    check_trials,
    grid,
    listed,
    number_of_trials,
    random_values,
    split_values,
    split_words,
    trial_recipe,
)

LR, RANK = "optimizer.lr", "adapter.rank"
RANGE = {"min": 1e-5, "max": 1e-3, "log": True}


def section(**settings: Any) -> SweepSection:
    return SweepSection.model_validate(settings)


def base(**changes: Any) -> dict[str, Any]:
    """A recipe as a user gives it."""
    return {
        "name": "toy",
        "model": {"path": "model"},
        "data": {
            "train": [{"path": "a.jsonl", "format": "text"}],
            "eval": [{"path": "b.jsonl", "format": "text"}],
            "sequence_length": 64,
        },
        "training": {"steps": 10, "global_batch": 6, "micro_batch": 2, "eval_every": 2},
        "optimizer": {"name": "adamw", "lr": 5e-3},
        "storage": "runs",
        **changes,
    }


def mistakes(sweep: dict[str, Any], **changes: Any) -> str:
    with pytest.raises(RecipeError) as raised:
        loads(as_text(base(sweep=sweep, **changes)))
    return str(raised.value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("1,2", ["1", "2"]),
        ("1", ["1"]),
        ("[a,b],[c]", ["[a,b]", "[c]"]),
        ("'a,b',c", ["'a,b'", "c"]),
        ("{min: 1, max: 2}", ["{min: 1, max: 2}"]),
        ("don't,can't", ["don't", "can't"]),
        ("null,3", ["null", "3"]),
    ],
)
def test_values_are_split_outside_of_brackets_and_quotes(text: str, parts: list[str]) -> None:
    assert split_values(text) == parts


def test_words_are_overrides_or_parameters() -> None:
    overrides, parameters = split_words(
        [f"{LR}=1e-4,3e-4", "training.steps=7", f"{RANK}=8,16", "adapter.dropout={min: 0, max: 0.1}", "wandb.group=a,7"]
    )
    assert overrides == ["training.steps=7"]
    assert parameters == {
        LR: [1e-4, 3e-4],
        RANK: [8, 16],
        "adapter.dropout": {"min": 0, "max": 0.1},
        "wandb.group": ["a", "7"],  # a text stays one
    }


def test_a_grid_does_not_depend_on_the_order_in_which_parameters_are_given() -> None:
    one = section(parameters={LR: [1e-4, 3e-4], RANK: [8, 16]})
    other = section(parameters={RANK: [8, 16], LR: [1e-4, 3e-4]})
    assert grid(one) == grid(other)
    assert grid(one)[:2] == [{RANK: 8, LR: 1e-4}, {RANK: 8, LR: 3e-4}]
    assert number_of_trials(one) == len(grid(one)) == 4


def test_random_trials_stay_when_their_number_grows() -> None:
    drawn = {LR: RANGE, RANK: [8, 16], "adapter.alpha": {"min": 4, "max": 32}, "adapter.dropout": {"mean": 0, "std": 1}}
    few, more = (random_values(section(parameters=drawn, trials=count)) for count in (5, 50))
    assert more[:5] == few
    assert len({tuple(values.items()) for values in more}) == 50
    assert random_values(section(parameters=drawn, trials=5, seed=1)) != few
    for values in more:
        assert 1e-5 <= values[LR] <= 1e-3
        assert isinstance(values["adapter.alpha"], int)
        assert 4 <= values["adapter.alpha"] <= 32
    logs = [math.log10(values[LR]) for values in more]
    assert -4.4 < sum(logs) / len(logs) < -3.6  # in the middle of the exponents


def test_random_trials_of_lists_are_never_the_same_twice() -> None:
    found = random_values(section(parameters={LR: [1e-4, 3e-4], RANK: [8, 16]}, trials=4))
    assert len({tuple(values.items()) for values in found}) == 4
    assert random_values(section(parameters={LR: [1e-4, 3e-4], RANK: [8, 16]}, trials=2)) == found[:2]


def test_a_step_gives_the_values_of_a_distance() -> None:
    found = random_values(section(parameters={"adapter.dropout": {"min": 0.0, "max": 0.3, "step": 0.1}}, trials=40))
    assert {round(values["adapter.dropout"], 9) for values in found} == {0.0, 0.1, 0.2, 0.3}


@pytest.mark.parametrize(
    ("settings", "search"),
    [
        ({"parameters": {LR: [1, 2]}}, "grid"),
        ({"parameters": {LR: [1, 2]}, "trials": 2}, "random"),
        ({"parameters": {LR: RANGE}}, "random"),
        ({"parameters": {LR: [1, 2]}, "search": "tpe"}, "tpe"),
    ],
)
def test_the_search_without_one(settings: dict[str, Any], search: str) -> None:
    found = section(**settings)
    assert found.chosen_search == search
    assert (listed(found) is None) == (search == "tpe")


@pytest.mark.parametrize(
    ("sweep", "said"),
    [
        ({"parameters": {"optimizer.lrr": [1]}}, "sweep.parameters.optimizer.lrr: unknown key; did you mean 'lr'?"),
        ({"parameters": {"storage": ["a", "b"]}}, "cannot vary: storage is the same for all trials"),
        ({"parameters": {"resources.workers": [1, 2]}}, "cannot vary: resources"),
        ({"parameters": {LR: {"min": 1, "max": 1}}}, "min 1 not below its max 1"),
        ({"parameters": {LR: {"min": 0, "max": 1, "log": True}}}, "has to be above 0"),
        ({"parameters": {LR: {"min": 1}}}, "needs both min and max"),
        ({"parameters": {LR: {"mean": 1}}}, "needs both mean and std"),
        ({"parameters": {LR: {"mean": 1, "std": 1}}, "search": "tpe"}, "which search tpe does not know"),
        ({"parameters": {LR: 5}}, "takes a list of values, or a mapping with min and max"),
        ({"parameters": {LR: []}}, "takes a list of values"),
        ({"parameters": {LR: [1, 1]}}, "names a value twice"),
        ({"parameters": {LR: RANGE}, "search": "grid"}, "is a range, and search grid takes lists"),
        ({"parameters": {LR: [1, 2]}, "search": "grid", "trials": 2}, "has no effect with search grid"),
        ({"parameters": {LR: [1, 2]}, "trials": 3}, "the lists have 2 combinations"),
        ({"parameters": {LR: [1, 2]}, "grace_steps": 3}, "has no effect with stop none"),
        ({"parameters": {LR: [1, 2]}, "stop": "median", "reduction_factor": 2.0}, "has no effect with stop median"),
        ({"parameters": {LR: [1, 2]}, "metric": "eval_los"}, "did you mean 'eval_loss'?"),
        ({"parameters": {LR: [1, 2]}, "search": "grids"}, "did you mean 'grid'?"),
    ],
)
def test_a_wrong_section_is_refused(sweep: dict[str, Any], said: str) -> None:
    assert said in mistakes(sweep)


def test_a_metric_that_is_never_measured_is_refused() -> None:
    data = {**base()["data"], "eval": []}
    training = {**base()["training"], "eval_every": None}
    assert "sweep.metric: is never measured" in mistakes({"parameters": {LR: [1, 2]}}, data=data, training=training)
    said = mistakes({"parameters": {LR: [1, 2]}, "stop": "asha"}, training=training)
    assert "sweep.stop: compares evaluations during training: give training.eval_every" in said
    training = {**base()["training"], "stop_after": 3}
    assert "training.stop_after interrupts it" in mistakes({"parameters": {LR: [1, 2]}}, training=training)


def test_what_a_sweep_would_ignore_is_refused() -> None:
    varied = {"parameters": {LR: [1, 2]}}
    assert "adapters: are several runs, and so is a sweep" in mistakes(varied, adapters={"a": {LR: 1e-3}})


def test_every_mistake_of_the_trials_is_reported_once_and_at_once() -> None:
    with pytest.raises(RecipeError) as raised:
        check_trials(base(), section(parameters={LR: [1e-4, -1.0], RANK: [8, 0], "training.micro_batch": [2, 7]}))
    paths = [mistake.path for mistake in raised.value.mistakes]
    assert sorted(paths) == [RANK, LR, "training.micro_batch"]
    assert "(in the trial with adapter.rank 8, optimizer.lr -1.0, training.micro_batch 2)" in str(raised.value)


def test_the_ends_of_a_range_are_checked_for_a_search_that_learns() -> None:
    found = section(parameters={LR: RANGE, "adapter.dropout": {"min": 0.0, "max": 1.5}}, search="tpe")
    with pytest.raises(RecipeError, match=r"adapter\.dropout"):
        check_trials(base(), found)
    check_trials(base(), section(parameters={LR: RANGE, RANK: [8, 16]}, search="tpe"))


def test_a_trial_has_the_defaults_of_its_own_optimizer_and_method() -> None:
    """A recipe with filled-in defaults of adamw and lora could not be changed to these."""
    values = {"optimizer.name": "muon", "adapter.method": "ia3"}
    recipe = trial_recipe(base(sweep={"parameters": {LR: [1, 2]}}), 7, values)
    assert (recipe.name, recipe.sweep) == ("toy-007", None)
    assert (recipe.optimizer.name, recipe.adapter.method) == ("muon", "ia3")


def test_the_best_recipe_is_that_of_the_trial() -> None:
    values = {LR: 3e-4, "adapter.target_modules": ["q_proj"]}
    found = loads(as_text(best_recipe(base(sweep={"parameters": {LR: [1, 2]}}), "toy-best", values)))
    trial = trial_recipe(base(), 1, values)
    assert found == trial.model_copy(update={"name": "toy-best"})


def test_a_stored_recipe_of_before_has_no_sweep(tmp_path: Path) -> None:
    assert small_recipe("plain", tmp_path / "model", tmp_path).sweep is None
