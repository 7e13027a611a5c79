"""A run on a Ray cluster of several hosts that come and go: submitted, moved, grown, shrunk, cancelled, looked at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.monitor.status import read_status
from tests.support.environment import notes, noting_recipe
from tests.support.hosts import Hosts
from tests.support.jobs import Command, start, wait_for_step, write_recipe
from tests.support.ray_hosts import RAY, RayOnHosts
from tests.support.training import run_of, small_recipe, write_pairs
from tests.support.waiting import IdleClock, wait_for
from trainer.recipe import Recipe
from trainer.run import layout
from trainer.run.jsonl import read_rows

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]
NOTICE = ("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot", "--deadline-remaining-seconds", "90")


@pytest.fixture
def ray(hosts: Hosts) -> RayOnHosts:
    """A cluster of three hosts with a CPU each."""
    cluster = RayOnHosts(hosts, cpus=1)
    cluster.start_all()
    return cluster


def starts(recipe: Recipe) -> dict[int, dict[str, Any]]:
    return {e["attempt"]: e for e in read_rows(run_of(recipe), layout.EVENTS) if e["event"] == "start"}


def last_step(recipe: Recipe, attempt: int) -> int:
    return max(r["step"] for r in read_rows(run_of(recipe), layout.METRICS) if r["attempt"] == attempt and "loss" in r)


def await_attempt(recipe: Recipe, attempt: int, command: Command, timeout_s: float = 90) -> float:
    """Seconds of an idle machine until it trains."""
    clock = IdleClock()

    def trains() -> bool:
        clock.seconds()
        assert command.process.poll() is None, command.output()[-3000:]
        return any(r["attempt"] == attempt for r in read_rows(run_of(recipe), layout.METRICS))

    wait_for(trains, f"attempt {attempt}", timeout_s, every_s=0.3, logs=command.output)
    return clock.seconds()


@pytest.mark.night
def test_a_run_follows_the_hosts_that_come_and_go(
    ray: RayOnHosts, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pairs(tmp_path / "data" / "a.jsonl", 90)
    changes = {"training.steps": 10**6, "checkpoint.every_steps": 10**6, "resources": {"workers": [1, 3]}}
    recipe = small_recipe("comes-and-goes", tiny_model, tmp_path, **changes)
    path = write_recipe(recipe, tmp_path)
    command = start(["-m", "launcher", "run", path, "--on", "ray", "--address", ray.dashboard])
    wait_for_step(recipe, 10, command)
    assert len(set(starts(recipe)[1]["hosts"])) == 3

    drained = ray.hosts.run(3, [RAY, "drain-node", "--address", ray.address, *NOTICE], env=ray.env)
    assert drained.returncode == 0, drained.stderr
    await_attempt(recipe, 2, command)
    assert ray.hosts.name(3) not in starts(recipe)[2]["hosts"]
    assert starts(recipe)[2]["step"] == last_step(recipe, 1), "it committed before it moved"

    ray.hosts.kill(3)
    ray.hosts.boot(3)
    ray.start(3)
    ray.await_started(3)
    await_attempt(recipe, 3, command)
    assert starts(recipe)[3]["world_size"] == 3
    assert starts(recipe)[3]["step"] == last_step(recipe, 2), "it committed before it grew"

    ray.hosts.kill(2)
    assert await_attempt(recipe, 4, command) < 60
    assert starts(recipe)[4]["world_size"] == 2
    assert starts(recipe)[4]["step"] == starts(recipe)[3]["step"], "from the newest checkpoint"

    cancelled = start(["-m", "launcher", "cancel", run_of(recipe).url])
    assert cancelled.wait(60) == 0, cancelled.output()
    assert command.wait(60) == 3, command.output()
    status = read_status(run_of(recipe))
    assert status.state == "interrupted"
    assert status.checkpoints[-1].step == status.step > starts(recipe)[4]["step"]
    kinds = [e["event"] for e in read_rows(run_of(recipe), layout.EVENTS)]
    assert (kinds.count("resize"), kinds.count("failure")) == (2, 1)


def test_doctor_names_a_host_that_is_cut_off(ray: RayOnHosts) -> None:
    ray.hosts.cut(3)
    clock = IdleClock()
    doctor = ray.hosts.run(1, [sys.executable, "-m", "launcher", "doctor", "--json"], env=ray.env, timeout=600)
    assert clock.seconds() < 60
    assert doctor.returncode == 1, doctor.stderr
    told = json.loads(doctor.stdout)
    assert told["verdict"] == "not ready"
    named = [f for f in told["findings"] if f["level"] == "failure" and ray.hosts.name(3) in f["where"]]
    assert named, told["findings"]
    assert all(f["do"] for f in named)


@pytest.mark.night
def test_a_job_has_the_users_files_and_environment(ray: RayOnHosts, tiny_model: Path, tmp_path: Path) -> None:
    """Submitted by muster, again under the same name, and by the printed commands."""
    recipe = noting_recipe("own-files", tiny_model, tmp_path, 2)
    (tmp_path / "code").mkdir()
    (tmp_path / "noting.py").rename(tmp_path / "code" / "noting.py")
    section = recipe.cluster.ray.model_copy(
        update={
            "address": ray.dashboard,
            "runtime_env": {"working_dir": str(tmp_path / "code"), "env_vars": {"NCCL_DEBUG": "INFO"}},
            "submission_id": "own-files",
            "metadata": {"team": "nlp"},
            "entrypoint_num_cpus": 0.5,
        }
    )
    recipe = recipe.model_copy(update={"cluster": recipe.cluster.model_copy(update={"ray": section})})
    arguments = ["-m", "launcher", "run", write_recipe(recipe, tmp_path), "--on", "ray"]
    for told in ("finished: the adapter is", "already"):
        command = start(arguments)
        assert command.wait(200) == 0, command.output()
        assert f"submitted as ray:{ray.dashboard}/own-files" in command.output()
        assert told in command.output()
    assert [(seen["hub"], seen["now"]) for seen in notes(tmp_path)] == [(str(tmp_path / "hub"), "WARN")] * 2

    overrides = ["name=by-hand", "cluster.ray.submission_id=by-hand"]
    render = [sys.executable, "-m", "launcher", "render", str(tmp_path / "own-files.yaml"), *overrides, "--on", "ray"]
    commands = subprocess.run(render, capture_output=True, text=True, check=True, timeout=60).stdout
    environment = {**os.environ, **ray.env, "RAY_ADDRESS": ray.dashboard}
    by_hand = subprocess.run(
        ["sh", "-eu"], input=commands, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert by_hand.returncode == 0, by_hand.stdout + by_hand.stderr
    assert len(notes(tmp_path)) == 4
