"""`cluster.env` reaches the workers of this machine before the libraries that read it are imported."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.environment import notes, noting_recipe
from tests.support.jobs import start, write_recipe

pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize("program", [("launcher", "run"), ("trainer",)], ids=["muster run", "torchrun"])
def test_a_worker_here_has_the_recipes_environment(program: tuple[str, ...], tiny_model: Path, tmp_path: Path) -> None:
    recipe = noting_recipe("noting", tiny_model, tmp_path, 1)
    inherited = {"PYTHONPATH": str(tmp_path), "HF_HOME": "/elsewhere", "NCCL_DEBUG": "INFO"}
    command = start(["-m", *program, write_recipe(recipe, tmp_path)], inherited)
    assert command.wait() == 0, command.output()
    (seen,) = notes(tmp_path)
    assert (seen["hub"], seen["now"]) == (str(tmp_path / "hub"), "WARN")
