"""The records of a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.cleanup.stored_run import delete_run, find_run
from launcher.testing.training import run_of, small_recipe
from trainer.errors import CorruptObject, RecipeChanged
from trainer.recipe import Recipe, dump
from trainer.run import layout
from trainer.run.lease import Lease
from trainer.run.sweep import (
    TrialRecord,
    change_trial,
    folder_of,
    freeze_sweep,
    parts_at,
    read_trial,
    read_trials,
    runs_at,
    sweep_at,
    write_trial,
)
from trainer.storage import Storage, open_storage

PARAMETERS = {"optimizer.lr": [1e-4, 3e-4], "adapter.rank": {"min": 2, "max": 8}}


def recipe_of(folder: Path, **sweep: Any) -> Recipe:
    changes = {"data.eval_fraction": 0.1, "training.eval_every": 2, "sweep": {"parameters": PARAMETERS, **sweep}}
    return small_recipe("toy", folder / "model", folder, **changes)


@pytest.fixture
def sweep(tmp_path: Path) -> Storage:
    return folder_of(open_storage(str(tmp_path / "runs")), "toy")


def test_a_trial_is_read_as_it_was_written(sweep: Storage) -> None:
    values = {"optimizer.lr": 0.00030000000000000003, "adapter.target_modules": ["q_proj"], "schedule.name": None}
    trials = [TrialRecord(number, f"toy-{number:03d}", values) for number in (2, 1, 11)]
    for trial in trials:
        write_trial(sweep, trial)
    assert read_trials(sweep) == sorted(trials, key=lambda trial: trial.number)
    change_trial(sweep, 2, state="stopping", step=20)
    assert read_trial(sweep, 2) == TrialRecord(2, "toy-002", values, "stopping", 20)
    assert read_trial(sweep, 3) is None


def test_a_record_of_something_else_is_named(sweep: Storage) -> None:
    sweep.write_json("trials/000001.json", {"number": "one"})
    with pytest.raises(CorruptObject, match="is no record of a trial"):
        read_trials(sweep)


@pytest.mark.parametrize(
    ("trial", "over"),
    [
        ({"state": "running"}, False),
        ({"state": "complete"}, True),
        ({"state": "stopped"}, True),
        ({"state": "stopping"}, True),
        ({"state": "failed"}, False),
        ({"state": "failed", "final": True}, True),
    ],
)
def test_what_is_not_trained_again(trial: dict[str, Any], over: bool) -> None:
    assert TrialRecord(1, "toy-001", **trial).is_over == over


def test_a_sweep_may_grow_but_not_change_once_a_trial_has_begun(sweep: Storage, tmp_path: Path) -> None:
    first, other = recipe_of(tmp_path, trials=4), recipe_of(tmp_path, trials=4, seed=3)
    freeze_sweep(sweep, first, dump(first))
    freeze_sweep(sweep, other, dump(other))  # nothing has begun
    write_trial(sweep, TrialRecord(1, "toy-001"))
    more = recipe_of(tmp_path, trials=9, seed=3, parallel=2)
    freeze_sweep(sweep, more, dump(more))
    for changed, said in {
        "sweep.seed: 3 -> 17": recipe_of(tmp_path, trials=9),
        "sweep.trials: 9 -> 4": other,
        "sweep.stop: none -> asha": recipe_of(tmp_path, trials=9, seed=3, stop="asha"),
        "sweep.search: random -> tpe": recipe_of(tmp_path, trials=9, seed=3, search="tpe"),
    }.items():
        with pytest.raises(RecipeChanged, match=changed):
            freeze_sweep(sweep, said, dump(said))
    longer = more.model_copy(update={"seed": 5})
    with pytest.raises(RecipeChanged, match="seed: 17 -> 5"):
        freeze_sweep(sweep, longer, dump(longer))


def test_the_runs_of_a_sweep_are_found_by_its_name(sweep: Storage, tmp_path: Path) -> None:
    uri = str(tmp_path / "runs" / "toy")
    assert sweep_at(uri) is None
    assert runs_at(uri) == [uri]
    recipe = recipe_of(tmp_path)
    freeze_sweep(sweep, recipe, dump(recipe))
    write_trial(sweep, TrialRecord(1, "toy-001"))
    write_trial(sweep, TrialRecord(2, "toy-002"))
    assert runs_at(f"{uri}/") == [f"{uri}-001", f"{uri}-002"]
    assert parts_at(uri) == [sweep.url]
    Lease.acquire(open_storage(f"{uri}-002")).release("interrupted")
    assert parts_at(uri) == [f"{uri}-002", sweep.url]
    found = find_run(open_storage(str(tmp_path / "runs" / "_sweeps")), "toy")
    assert found.others == []
    assert delete_run(found) > 0
    assert sweep.list() == []
    freeze_sweep(sweep, recipe, dump(recipe))
    run_of(recipe).write(layout.RECIPE, dump(recipe).encode())
    assert runs_at(uri) == [uri]  # a run of that name comes first
