"""`cluster.env` reaches the workers on a Ray cluster when their processes start, and those of a Ray of this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.environment import notes, noting_recipe
from tests.support.jobs import start, write_recipe

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


def test_the_workers_of_a_cluster_start_with_the_recipes_environment(
    joined: str, tiny_model: Path, tmp_path: Path
) -> None:
    check(tiny_model, tmp_path)


@pytest.mark.night
def test_the_workers_of_a_local_ray_start_with_it(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    check(tiny_model, tmp_path)


def check(model: Path, folder: Path) -> None:
    recipe = noting_recipe("noting", model, folder, 2)
    inherited = {"PYTHONPATH": str(folder), "HF_HOME": "/elsewhere", "NCCL_DEBUG": "INFO"}
    command = start(["-m", "launcher", "run", write_recipe(recipe, folder)], inherited)
    assert command.wait() == 0, command.output()
    assert notes(folder) == [{"hub": str(folder / "hub"), "now": "WARN", "start": "WARN"}] * 2
