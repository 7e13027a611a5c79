"""How many trials of a sweep train at the same time, and with how many workers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.sweep import sweep as module
from launcher.sweep.sweep import check_ended, check_search, free_places, least_workers, section_of, share
from launcher.testing.training import small_recipe
from tests.support.nodes import nodes
from trainer.errors import Interrupted, UsageError
from trainer.recipe import Recipe, ResourcesSection
from trainer.recipe.sections.sweep import SweepSection
from trainer.run.sweep import TrialRecord, folder_of, write_trial
from trainer.storage import open_storage


def recipe_of(folder: Path, workers: Any, context: int = 1) -> Recipe:
    recipe = small_recipe("toy", folder / "model", folder, resources={"workers": workers})
    strategy = recipe.strategy.model_copy(update={"context_parallel": context})
    return recipe.model_copy(update={"strategy": strategy})


@pytest.mark.parametrize(
    ("workers", "places", "parallel", "given"),
    [
        (2, 8, 4, 2),
        ([1, 8], 8, 4, (1, 2)),
        ([1, 8], 8, 1, (1, 8)),
        ([2, 3], 16, 2, (2, 3)),
        ([1, 8], 3, 2, (1, 1)),
        ([2, 8], 1, 1, (2, 2)),
    ],
)
def test_an_elastic_trial_leaves_the_others_their_places(
    tmp_path: Path, workers: Any, places: int, parallel: int, given: Any
) -> None:
    assert share(recipe_of(tmp_path, workers), places, parallel) == given


def test_groups_of_context_ranks_stay_complete(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, [3, 16], context=4)
    assert least_workers(recipe) == 4
    assert share(recipe, 14, 2) == (3, 4)


def test_places_that_have_just_been_left_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([nodes({"CPU": 4.0}), nodes({"CPU": 4.0}), nodes({"CPU": 4.0})])
    free = iter([0, 1, 4])
    monkeypatch.setattr(module, "room", lambda *_: next(free))
    monkeypatch.setattr(module.time, "sleep", lambda _: None)
    ray: Any = SimpleNamespace(nodes=lambda: next(looks))
    assert free_places(ResourcesSection(workers=1), ray, 4, lambda: False) == 4


def test_a_sweep_has_not_ended_before_all_of_its_trials(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, 1)
    recipe = recipe.model_copy(update={"sweep": SweepSection.model_validate({"parameters": {"seed": [1, 2]}})})
    folder = folder_of(open_storage(str(tmp_path / "runs")), recipe.name)
    write_trial(folder, TrialRecord(1, f"{recipe.name}-001", {"seed": 1}, state="complete"))
    with pytest.raises(Interrupted, match="1 of 2 trials have not ended; the same command resumes"):
        check_ended(recipe, folder)
    write_trial(folder, TrialRecord(2, f"{recipe.name}-002", {"seed": 2}, state="failed"))
    check_ended(recipe, folder)


def test_without_parameters_there_is_no_sweep(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing varies: give KEY=V1,V2"):
        section_of(recipe_of(tmp_path, 1))


def test_a_search_needs_its_library_before_ray_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    ranges = {"parameters": {"optimizer.lr": {"min": 1e-5, "max": 1e-3}}, "search": "tpe"}
    recipe = small_recipe("toy", tmp_path / "model", tmp_path, sweep=ranges, **{"data.eval_fraction": 0.1})
    check_search(section_of(recipe))
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UsageError, match="pip install optuna"):
        check_search(section_of(recipe))
