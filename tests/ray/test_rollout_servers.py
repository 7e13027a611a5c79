"""GRPO with vLLM servers that Ray places beside the workers: both write, and what their deaths mean."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.fake_vllm_program import WritingPython
from tests.support.jobs import Command, muster_run, wait_for_step
from tests.support.tasks import task_recipe, write_task_data
from tests.support.training import run_of
from tests.support.waiting import wait_for
from trainer.recipe import Recipe
from trainer.run import layout
from trainer.run.jsonl import read_rows

pytestmark = [pytest.mark.ray, pytest.mark.night, pytest.mark.timeout(600)]


@pytest.fixture
def python(tmp_path: Path) -> WritingPython:
    return WritingPython.make(tmp_path / "vllm")


def beside(name: str, python: WritingPython, model: Path, folder: Path, **changes: Any) -> Recipe:
    write_task_data(folder, "grpo")
    settings = {
        "rollout": {"engine": "vllm", "vllm": {"python": python.path, "servers": 2}},
        "training.steps": 4,
        "checkpoint.every_steps": 2,
        "data.eval": [],
        "training.eval_every": None,
        "resources": {"workers": 2},
    }
    return task_recipe("grpo", name, model, folder, **{**settings, **changes})


def failures(recipe: Recipe) -> list[Mapping[str, Any]]:
    return [event for event in read_rows(run_of(recipe), layout.EVENTS) if event["event"] == "failure"]


def actors() -> list[int]:
    return [process.pid for process in psutil.process_iter() if "ray::ServerActor" in " ".join(_title(process))]


def _title(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def finished(command: Command) -> str:
    assert command.wait() == 0, command.output()
    return command.output()


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_both_servers_write_and_end_with_the_run(
    joined: str, python: WritingPython, tiny_model: Path, tmp_path: Path
) -> None:
    recipe = beside("both", python, tiny_model, tmp_path)
    output = finished(muster_run(recipe, tmp_path))
    assert not failures(recipe)
    (key,) = python.keys()
    assert key not in output
    run = run_of(recipe)
    assert not [info.key for info in run.list() if key.encode() in run.read(info.key)]
    logs = [path for path in Path("/tmp/ray/session_latest/logs").rglob("*") if path.is_file()]
    assert logs
    assert not [path for path in logs if key.encode() in path.read_bytes()]
    pids = python.pids()
    assert len(pids) == 2
    written = python.writers()
    assert set(written) == set(pids)
    for adapters in written.values():
        assert {name.rpartition("-")[2] for name in adapters - {"base"}} == {"0", "1", "2", "3"}
    wait_for(lambda: all(map(is_gone, pids)) and not actors(), "the end of the servers")


def test_a_killed_server_is_started_again_in_the_same_attempt(
    joined: str, python: WritingPython, tiny_model: Path, tmp_path: Path
) -> None:
    recipe = beside("revived", python, tiny_model, tmp_path, **{"training.steps": 12})
    command = muster_run(recipe, tmp_path)
    wait_for_step(recipe, 2, command)
    victim = python.pids()[0]
    os.kill(victim, signal.SIGKILL)
    finished(command)
    assert not failures(recipe)
    assert len(python.pids()) == 3
    assert python.pids()[2] in python.writers()


def test_an_actor_that_dies_ends_the_attempt_and_not_the_run(
    joined: str, python: WritingPython, tiny_model: Path, tmp_path: Path
) -> None:
    recipe = beside("actor", python, tiny_model, tmp_path, **{"training.steps": 12})
    command = muster_run(recipe, tmp_path)
    wait_for_step(recipe, 2, command)
    os.kill(actors()[0], signal.SIGKILL)
    finished(command)
    (failure,) = failures(recipe)
    assert failure["retried"]
    assert f"the vLLM server on {os.uname().nodename}" in failure["cause"]
    assert "has ended" in failure["cause"]
    pids = python.pids()
    assert len(pids) == 4
    wait_for(lambda: all(map(is_gone, pids)) and not actors(), "the end of the servers")


def test_a_killed_driver_leaves_no_server(joined: str, python: WritingPython, tiny_model: Path, tmp_path: Path) -> None:
    recipe = beside("orphans", python, tiny_model, tmp_path, **{"training.steps": 200})
    command = muster_run(recipe, tmp_path)
    wait_for_step(recipe, 1, command)
    os.kill(command.process.pid, signal.SIGKILL)
    wait_for(lambda: all(map(is_gone, python.pids())) and not actors(), "the end of the servers", timeout_s=90)
