"""`muster run` with one worker on this machine: a child process, and no Ray."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import psutil
import pytest

from tests.support.jobs import Command, start, wait_for_step, workers, write_recipe
from tests.support.training import adapter_bytes, ledger, run_of, small_recipe, write_pairs
from tests.support.waiting import wait_for
from trainer.recipe import Recipe
from trainer.run import layout
from trainer.run.jsonl import read_rows

pytestmark = pytest.mark.timeout(300)
CHANGES = {"training.steps": 120, "checkpoint.every_steps": 10, "resources": {"workers": 1}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_pairs(tmp_path / "data" / "a.jsonl", 90)
    (tmp_path / "hidden" / "ray").mkdir(parents=True)
    (tmp_path / "hidden" / "ray" / "__init__.py").write_text("raise ImportError('Ray is imported')\n")
    return tmp_path


def run(recipe: Recipe, folder: Path) -> Command:
    """Ray cannot be imported by any process of the command."""
    return start(["-m", "launcher", "run", write_recipe(recipe, folder)], {"PYTHONPATH": str(folder / "hidden")})


@pytest.fixture
def undisturbed(tiny_model: Path, folder: Path) -> Recipe:
    recipe = small_recipe("undisturbed", tiny_model, folder, **CHANGES)
    command = run(recipe, folder)
    assert command.wait() == 0, command.output()
    *lines, finished, learned, chat, report, serve = command.output().splitlines()
    assert finished.startswith("finished: the adapter is")
    assert re.fullmatch(r"loss \S+ → \S+, 120 steps, \d:\d\d, [\d,]+ tokens", learned)
    assert (chat, report) == (f"muster chat --run {recipe.run_uri}", f"muster report {recipe.run_uri}")
    assert serve.startswith("vllm serve ")
    assert "step 120/120" in lines[-1]
    assert "saved 120" in lines[-1]
    return recipe


def test_a_worker_that_is_killed_is_started_again_at_the_same_sample(
    undisturbed: Recipe, tiny_model: Path, folder: Path
) -> None:
    recipe = small_recipe("killed", tiny_model, folder, **CHANGES)
    command = run(recipe, folder)
    wait_for_step(recipe, 15, command)
    os.kill(workers(recipe)[0], signal.SIGKILL)
    assert command.wait() == 0, command.output()
    assert adapter_bytes(recipe) == adapter_bytes(undisturbed)
    assert ledger(recipe) == ledger(undisturbed)
    (failure,) = [e for e in read_rows(run_of(recipe), layout.EVENTS) if e["event"] == "failure"]
    assert (failure["rank"], failure["retried"]) == (0, True)
    assert "killed by SIGKILL" in failure["cause"]


def test_its_error_is_the_commands(tiny_model: Path, folder: Path) -> None:
    recipe = small_recipe("diverging", tiny_model, folder, **CHANGES, **{"optimizer.lr": 1e30})
    command = run(recipe, folder)
    assert command.wait() == 1, command.output()
    assert "the loss is not finite" in command.output()


def test_terminated_it_commits_and_the_same_command_resumes(tiny_model: Path, folder: Path) -> None:
    recipe = small_recipe("terminated", tiny_model, folder, **CHANGES)
    command = run(recipe, folder)
    wait_for_step(recipe, 15, command)
    os.killpg(command.process.pid, signal.SIGTERM)  # as a scheduler does; the worker leaves it to the driver
    assert command.wait() == 3, command.output()
    assert command.output().splitlines()[-1].startswith("muster: interrupted: ")
    again = run(small_recipe("terminated", tiny_model, folder, **CHANGES, **{"training.micro_batch": 1}), folder)
    assert again.wait() == 0, again.output()
    assert "changed since the attempt before: training.micro_batch 2 → 1" in again.output()


def test_it_ends_with_a_driver_that_is_killed(tiny_model: Path, folder: Path) -> None:
    recipe = small_recipe("orphan", tiny_model, folder, **CHANGES)
    command = run(recipe, folder)
    wait_for_step(recipe, 5, command)
    (worker,) = workers(recipe)
    os.kill(command.process.pid, signal.SIGKILL)
    wait_for(lambda: not psutil.pid_exists(worker), "the end of the worker", timeout_s=60)
