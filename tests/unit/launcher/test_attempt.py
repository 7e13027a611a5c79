"""A job that arrives at a worker as plain values."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from launcher import attempt
from launcher.raytrain.environment import Environment
from tests.support.plugins import ROW, forget_rows, no_plugins
from tests.support.training import small_recipe
from trainer.registry import IMPORTED
from trainer.run.failure import WorkerError
from trainer.worker.job import Job

__all__ = ["no_plugins"]


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_plugins: None) -> dict[str, Any]:
    """A job whose recipe has the settings of a plug-in, which is a file in the driver's working folder."""
    (tmp_path / "plugged_away.py").write_text(ROW.format(mark=str(tmp_path / "mark"), module="plugged_away"))
    monkeypatch.chdir(tmp_path)
    recipe = small_recipe("a", tmp_path, tmp_path, task="plugged_away:ROW", row={"gamma": 3.0})
    return Job("runs", 1, recipe, 4, {}).packed()


def forget(monkeypatch: pytest.MonkeyPatch, elsewhere: Path) -> None:
    """Makes this process one on another host."""
    monkeypatch.chdir(elsewhere)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(elsewhere.parent)])
    del sys.modules["plugged_away"]
    forget_rows()


def test_a_worker_finds_a_plug_in_in_the_drivers_folder(
    job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment, trained = Environment.current(), list[Any]()
    assert environment.variables[IMPORTED] == "muster.tasks=plugged_away:ROW"
    (tmp_path / "other").mkdir()
    forget(monkeypatch, tmp_path / "other")
    monkeypatch.setattr(attempt, "run_rank", lambda job, rank, ranks: trained.append(job))
    environment.apply()
    attempt.run_packed(job, 0, 1)
    assert trained[0].recipe.row.gamma == 3.0


def test_a_worker_without_the_plug_in_says_so_and_another_attempt_is_in_vain(
    job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    forget(monkeypatch, tmp_path / "other")
    with pytest.raises(
        WorkerError, match=r"plug-in of the recipe cannot be imported on this host: .*No module"
    ) as said:
        attempt.run_packed(job, 1, 2)
    assert said.value.fatal
    assert said.value.kind.usage
