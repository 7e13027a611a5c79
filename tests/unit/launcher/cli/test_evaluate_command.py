"""`muster evaluate` with a recipe, and without one of a run, which has its own."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

import trainer.evaluate
from tests.support.tasks import task_recipe, write_task_data
from tests.support.training import run_of, small_recipe, train_here
from tests.unit.launcher.cli.test_app import Muster
from trainer.progress.ending import last_lines
from trainer.recipe import Recipe, dump
from trainer.run import layout
from trainer.storage import open_storage

EVALUATED = [{"path": "held-out.jsonl", "format": "completion"}]


@pytest.fixture
def muster(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Muster:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.chdir(tmp_path)
    return Muster(capsys, monkeypatch)


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """The recipes that were evaluated."""
    found: list[Recipe] = []

    def evaluate(recipe: Recipe, address: Any, **options: Any) -> dict[str, float]:
        found.append(recipe)
        return {"loss": 1.5}

    monkeypatch.setattr(trainer.evaluate, "evaluate", evaluate)
    return found


def begun(folder: Path, **changes: Any) -> str:
    """The URI of a run with this recipe."""
    recipe = small_recipe("mine", folder / "model", folder, **changes)
    run = open_storage(recipe.storage).child(recipe.name)
    run.write(layout.RECIPE, dump(recipe).encode())
    return run.url


def test_a_run_needs_no_recipe(muster: Muster, evaluated: list[Recipe], tmp_path: Path) -> None:
    run = begun(tmp_path, **{"data.eval": EVALUATED})
    assert muster("evaluate", "--run", run) == 0
    assert json.loads(muster.out) == {"loss": 1.5}
    assert [source.path for source in evaluated[0].data.eval] == ["held-out.jsonl"]


def test_any_key_of_the_runs_recipe_can_be_changed(muster: Muster, evaluated: list[Recipe], tmp_path: Path) -> None:
    run = begun(tmp_path)
    change = "data.eval=[{path: other.jsonl, format: qa}]"
    assert muster("evaluate", "--run", run, change, "training.micro_batch=1") == 0
    assert [(source.path, source.format) for source in evaluated[0].data.eval] == [("other.jsonl", "qa")]
    assert evaluated[0].training.micro_batch == 1


def test_a_recipe_of_ones_own_counts(muster: Muster, evaluated: list[Recipe], tmp_path: Path) -> None:
    run = begun(tmp_path)
    Path("a=b.yaml").write_text(dump(small_recipe("other", tmp_path / "model", tmp_path, **{"data.eval": EVALUATED})))
    assert muster("evaluate", "a=b.yaml", "--run", run) == 0
    assert evaluated[0].name == "other"


def test_a_run_without_evaluation_data_is_told_how_to_name_some(
    muster: Muster, evaluated: list[Recipe], tmp_path: Path
) -> None:
    run = begun(tmp_path)
    assert muster("evaluate", "--run", run) == 2
    assert muster.err.splitlines() == [
        f"muster: error: the recipe of {run} has no evaluation data; name some: "
        f"muster evaluate --run {run} 'data.eval=[{{path: FILE, format: completion}}]'"
    ]
    assert evaluated == []


def test_what_has_no_recipe_needs_one(muster: Muster, tmp_path: Path) -> None:
    assert muster("evaluate", "--model", "a/b") == 2
    assert "name the RECIPE whose evaluation data are used" in muster.last_line()
    assert muster("evaluate", "--run", str(tmp_path)) == 2
    assert "there is no run at" in muster.last_line()


@pytest.mark.parametrize(("task", "has_eval"), [("classification", True), ("reward", False)])
def test_the_command_that_a_run_without_texts_ends_with_measures_it(
    muster: Muster, tiny_model: Path, tmp_path: Path, task: str, has_eval: bool
) -> None:
    write_task_data(tmp_path, task)
    few = {"training.steps": 2, "checkpoint.every_steps": 2, "training.eval_every": None}
    recipe = task_recipe(task, "measured", tiny_model, tmp_path, **few, **({} if has_eval else {"data.eval": []}))
    assert train_here(recipe) == "succeeded"
    _, command, _ = last_lines(recipe, run_of(recipe), "adapter")
    program, *words = shlex.split(command)
    assert (program, "FILE" in command) == ("muster", not has_eval)
    assert muster(*(word.replace("FILE", f"{tmp_path}/{task}/eval.jsonl") for word in words)) == 0, muster.err
    assert json.loads(muster.out).items() >= {"task": task, "samples": 11}.items()
