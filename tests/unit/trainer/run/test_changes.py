"""What may change between the attempts of a run, what is refused with its reason, and what is recorded of it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from tests.support.training import small_recipe
from tests.unit.trainer.run.test_frozen import committed
from trainer.errors import RecipeChanged
from trainer.recipe import Recipe, fingerprint
from trainer.recipe.base import KeyPath
from trainer.recipe.sections.rollouts.reward import RewardFunctionSection
from trainer.recipe.trackers import TRACKERS
from trainer.recipe.tree import dotted, fields_below
from trainer.recipe.writing import LENGTH, changeable, changeable_values, may_change
from trainer.run.changes import refusals
from trainer.run.events import ChangeEvent, SettingChange
from trainer.run.frozen import check_same_recipe, freeze_recipe, read_recipe, resumed_recipe
from trainer.run.jsonl import read_events
from trainer.storage import Storage, open_storage

FIELDS = list(fields_below(Recipe, ()))
LEAVES = [path for path in FIELDS if not any(other[: len(path)] == path and other != path for other in FIELDS)]
OTHERS = {"adapter.method": "dora", "schedule.name": "linear", "schedule.warmup_ratio": 0.5, "training.steps": 5}
"""Values where any text would not do."""


def make(**changes: Any) -> Recipe:
    folder = Path("folder")
    evaluation = [{"path": "held-out", "format": "completion"}]
    compared = {"training.eval_every": 2, "training.early_stop": {"metric": "eval_loss", "patience": 3}, "sweep": {}}
    return small_recipe("run", folder / "model", folder, **{"data.eval": evaluation, **compared, **changes})


def with_value(value: Any, path: KeyPath, new: Any) -> Any:
    """The recipe with another value at the path, valid or not."""
    if not path:
        return new
    key, *rest = path
    if isinstance(key, int):
        return tuple(with_value(one, tuple(rest), new) if i == key else one for i, one in enumerate(value))
    return value.model_copy(update={str(key): with_value(getattr(value, str(key)), tuple(rest), new)})


@pytest.fixture
def run(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "run"))


@pytest.mark.parametrize("path", LEAVES, ids=dotted)
def test_every_field_decides_the_result_or_may_change_and_is_recorded(path: KeyPath) -> None:
    frozen = make()
    for task in ("ppo", "grpo"):  # which refuse to be given with this recipe's task
        functions = (RewardFunctionSection(function="rewards.py:short"),)
        frozen = with_value(frozen, (task, "reward", "functions"), functions)
    new = with_value(frozen, path, OTHERS.get(dotted(path), "another value"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydantic's, of the value
        refused = refusals(frozen, new)
        before = changeable_values(frozen)
        recorded = [k for k, v in changeable_values(new).items() if before[k] != v]
        same = fingerprint(new) == fingerprint(frozen)
    assert refused == [] if may_change(path) else dotted(path) in refused[0]
    assert recorded == ([dotted(path)] if may_change(path) or path in LENGTH else [])
    assert same == (may_change(path) or path in LENGTH)


def test_an_out_of_memory_can_be_remedied() -> None:
    for key in ("training.micro_batch", "training.gradient_checkpointing", "strategy", "compute", "resources"):
        assert key in map(dotted, changeable())


@pytest.mark.parametrize("tracker", TRACKERS.names())
def test_a_tracker_and_its_settings_may_change(tracker: str) -> None:
    assert may_change(("tracking",))
    assert may_change((tracker,)) or tracker not in Recipe.model_fields


@pytest.mark.parametrize(
    ("before", "after", "refused"),
    [
        ({}, {"training.steps": 20}, None),
        ({"schedule.warmup_steps": 3}, {"training.steps": 20}, None),
        ({}, {"training.steps": 9}, "training.steps: 10 -> 9"),
        ({"training.steps": None, "training.epochs": 2}, {"training.epochs": 3}, None),
        ({}, {"training.steps": None, "training.epochs": 3}, "training.steps: 10 -> null"),
        ({"schedule.name": "cosine"}, {"training.steps": 20}, "10 -> 20 (the learning rate of schedule cosine falls"),
        ({"schedule.warmup_ratio": 0.1}, {"training.steps": 20}, "10 -> 20 (the warm-up takes 0.1 of all steps"),
        ({"adapter": {"method": "adalora"}}, {"training.steps": 20}, "10 -> 20 (adapter.method adalora has a schedule"),
        ({}, {"training.steps": 20, "optimizer.lr": 1.0}, "optimizer.lr: 0.005 -> 1.0"),
    ],
)
def test_a_run_becomes_longer_where_no_step_depends_on_its_length(
    run: Storage, before: dict[str, Any], after: dict[str, Any], refused: str | None
) -> None:
    frozen, new = make(**before), make(**(before | after))
    freeze_recipe(run, frozen)
    committed(run)
    if refused is not None:
        with pytest.raises(RecipeChanged) as error:
            freeze_recipe(run, new)
        assert refused in str(error.value)
        assert read_recipe(run) == frozen
        return
    freeze_recipe(run, new, driver=2)
    assert read_recipe(run) == new
    assert fingerprint(new) == fingerprint(frozen), "a tracker continues the curve"
    with pytest.raises(RecipeChanged):
        check_same_recipe(run, frozen)


def test_who_cannot_train_longer_is_told_what_works(run: Storage) -> None:
    def advice(**changes: Any) -> str:
        run.delete([found.key for found in run.list()])
        freeze_recipe(run, make(**{"schedule.name": "linear", **changes}))
        committed(run)
        with pytest.raises(RecipeChanged) as error:
            check_same_recipe(run, make(**{"schedule.name": "linear", "training.steps": 20, **changes}))
        return str(error.value).splitlines()[-1]

    other = "Run it with its own recipe, or give the new recipe another name"
    begin = f"{other}; to train longer, begin another run from its result"
    assert advice() == f"{begin}, with adapter.from: {run.url}."
    assert (
        advice(adapter={"method": "pissa"})
        == f"{begin}: `muster merge --run {run.url} --out DIR`, then model.path: DIR."
    )
    assert advice(adapter={"method": "none"}) == f"{begin}, with model.path: {run.url}/adapter."
    assert advice(adapter={"method": "prefix"}) == f"{other}."


def test_the_overrides_of_a_stored_run_may_make_it_longer(run: Storage) -> None:
    freeze_recipe(run, make())
    committed(run)
    assert resumed_recipe(run, ["training.steps=20"]).training.steps == 20
    with pytest.raises(RecipeChanged, match="this cannot change"):
        resumed_recipe(run, ["training.steps=5"])


def test_each_change_is_recorded_once_against_the_attempt_before(run: Storage) -> None:
    freeze_recipe(run, make(), driver=1)
    freeze_recipe(run, make(**{"training.micro_batch": 3}), driver=2)
    assert read_events(run) == [], "before the first commit the recipe itself is replaced"
    committed(run)
    smaller = {"training.micro_batch": 1, "training.gradient_checkpointing": True}
    freeze_recipe(run, make(**smaller), driver=3)
    freeze_recipe(run, make(**smaller), driver=4)
    freeze_recipe(run, make(**smaller, **{"resources.workers": [1, 2], "training.steps": 20}), driver=5)
    freeze_recipe(run, make(**{"training.micro_batch": 3, "training.steps": 20}), driver=6)
    events = sorted((event for event in read_events(run) if isinstance(event, ChangeEvent)), key=lambda e: e.time)

    def change(key: str, before: Any, after: Any) -> SettingChange:
        return SettingChange(key=key, before=before, after=after)

    assert [(event.driver, set(map(str, event.changes))) for event in events] == [
        (
            3,
            {
                str(change("training.micro_batch", 3, 1)),
                str(change("training.gradient_checkpointing", False, True)),
            },
        ),
        (5, {str(change("resources.workers", 1, [1, 2])), str(change("training.steps", 10, 20))}),
        (
            6,
            {
                str(change("training.micro_batch", 1, 3)),
                str(change("training.gradient_checkpointing", True, False)),
                str(change("resources.workers", [1, 2], 1)),
            },
        ),
    ]
