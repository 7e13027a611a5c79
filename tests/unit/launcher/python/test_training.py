"""`import muster`: a run from Python, what it stores, and its errors."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest

import launcher.python as muster
from tests.support.training import small_recipe, write_pairs

CHANGES: dict[str, Any] = {"training.steps": 6, "checkpoint.every_steps": 3, "resources": {"workers": 1}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("python")
    write_pairs(folder / "data" / "a.jsonl", 40)
    return folder


@pytest.fixture(scope="module")
def run(tiny_model: Path, folder: Path) -> muster.Run:
    return muster.run(small_recipe("from-python", tiny_model, folder, **CHANGES))


def test_a_run_is_read_again_by_its_uri(run: muster.Run, folder: Path) -> None:
    again = muster.Run(str(folder / "runs" / "from-python"))
    assert again == run
    status = again.status()
    assert (status.state, status.step, status.attempts) == ("succeeded", 6, 1)
    rows = again.metrics()
    assert list(rows["step"]) == [1, 2, 3, 4, 5, 6]
    assert all(map(math.isfinite, rows["loss"]))
    kinds = [type(event).__name__ for event in again.events()]
    assert kinds.index("StartEvent") < kinds.index("EndEvent")
    assert [c.step for c in again.checkpoints()] == [3, 6]
    assert again.adapter_uri == str(folder / "runs" / "from-python" / "adapter")


def test_rows_are_dictionaries_without_pandas(run: muster.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    rows = run.metrics()
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]


@pytest.mark.night
def test_a_run_that_has_not_ended_has_the_adapter_of_its_newest_checkpoint(tiny_model: Path, folder: Path) -> None:
    recipe = small_recipe("stopped", tiny_model, folder, **CHANGES, **{"training.stop_after": 4})
    with pytest.raises(muster.Interrupted, match="stopped on request"):
        muster.run(recipe)
    run = muster.Run(recipe.run_uri)
    assert run.status().state == "interrupted"
    assert run.adapter_uri == run.checkpoints()[-1].uri
    assert run.checkpoints()[-1].step == 4
    assert muster.run(recipe.model_copy(update={"training": recipe.training.model_copy(update={"stop_after": None})}))
    assert run.status().step == 6


def test_errors_are_the_commands(tiny_model: Path, folder: Path, run: muster.Run) -> None:
    with pytest.raises(muster.InputError, match="nowhere"):
        muster.run(small_recipe("no-model", folder / "nowhere", folder, **CHANGES))
    with pytest.raises(muster.RecipeChanged, match=r"optimizer\.lr"):
        muster.run(small_recipe("from-python", tiny_model, folder, **CHANGES, **{"optimizer.lr": 1e-3}))
    with pytest.raises(muster.InputError, match="there is no run"):
        muster.Run(str(folder / "runs" / "other")).metrics()
    with pytest.raises(muster.InputError, match="there is no run"):
        muster.Run(str(folder / "runs" / "other")).status()


def test_a_driver_that_dies_is_an_error_that_says_how_to_go_on(
    tiny_model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "sitecustomize.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    with pytest.raises(muster.WorkerFailed, match="the driver was killed by SIGKILL; the same recipe resumes"):
        muster.run(small_recipe("dies", tiny_model, folder, **CHANGES))


def test_a_plan_is_printed_as_the_command_prints_it(tiny_model: Path, folder: Path) -> None:
    found = muster.plan(small_recipe("planned", tiny_model, folder), gpu_memory="24GiB")
    assert "peak on the device" in str(found)
    assert found.to_json()["fits"] is True
    with pytest.raises(muster.UsageError, match="24 monkeys"):
        muster.plan(small_recipe("planned", tiny_model, folder), gpu_memory="24 monkeys")
