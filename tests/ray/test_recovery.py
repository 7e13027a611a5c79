"""Killed and interrupted runs end as if nothing had happened: the same samples, the same bytes."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from launcher.monitor.status import read_status
from tests.support.jobs import muster_run, start, wait_for_step, workers
from tests.support.training import adapter_bytes, ledger, run_of, small_recipe, train_in_processes, write_pairs
from trainer.recipe import Recipe
from trainer.run import layout
from trainer.run.jsonl import read_rows

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
CHANGES = {"training.steps": 150, "checkpoint.every_steps": 10, "resources": {"workers": 2}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("recovery")
    write_pairs(made / "data" / "a.jsonl", 90)
    return made


@pytest.fixture(scope="module")
def undisturbed(tiny_model: Path, folder: Path) -> Recipe:
    recipe = small_recipe("undisturbed", tiny_model, folder, **CHANGES)
    train_in_processes([recipe], 2)
    return recipe


def test_a_killed_worker_is_replaced(joined: str, undisturbed: Recipe, tiny_model: Path, folder: Path) -> None:
    recipe = small_recipe("worker-killed", tiny_model, folder, **CHANGES)
    command = muster_run(recipe, folder)
    wait_for_step(recipe, 25, command)
    os.kill(workers(recipe)[0], signal.SIGKILL)
    assert command.wait() == 0, command.output()
    assert adapter_bytes(recipe) == adapter_bytes(undisturbed)
    assert ledger(recipe) == ledger(undisturbed)
    failures = [e for e in read_rows(run_of(recipe), layout.EVENTS) if e["event"] == "failure"]
    assert len(failures) == 1
    assert failures[0]["retried"]
    # Ray may end the other rank before it has recorded where it last saw this one.
    seen = rf"on {os.uname().nodename} died \((last seen at|after) step \d+"
    assert re.search(seen, failures[0]["cause"]), failures[0]["cause"]
    assert "dmesg" in failures[0]["advice"]
    assert read_status(run_of(recipe)).attempts == 2


@pytest.mark.night
def test_a_stopped_worker_is_named_ended_and_replaced(
    joined: str, undisturbed: Recipe, tiny_model: Path, folder: Path
) -> None:
    recipe = small_recipe("worker-stopped", tiny_model, folder, **CHANGES)
    command = muster_run(recipe, folder)
    wait_for_step(recipe, 25, command)
    os.kill(workers(recipe)[1], signal.SIGSTOP)
    assert command.wait() == 0, command.output()
    assert adapter_bytes(recipe) == adapter_bytes(undisturbed)
    events = read_rows(run_of(recipe), layout.EVENTS)
    (hang,) = [e for e in events if e["event"] == "hang"]
    (failure,) = [e for e in events if e["event"] == "failure"]
    assert failure["cause"] == hang["cause"]
    assert "held up by rank" in hang["cause"]


@pytest.mark.night
def test_interrupted_by_the_user_and_finished_by_torchrun(
    joined: str, undisturbed: Recipe, tiny_model: Path, folder: Path
) -> None:
    recipe = small_recipe("interrupted", tiny_model, folder, **CHANGES)
    command = muster_run(recipe, folder)
    wait_for_step(recipe, 15, command)
    command.interrupt()
    assert command.wait(60) == 3, command.output()
    status = read_status(run_of(recipe))
    assert status.state == "interrupted"
    assert status.checkpoints[-1].step == status.step >= 15
    torchrun = start(
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "trainer", run_of(recipe).url]
    )
    assert torchrun.wait() == 0, torchrun.output()
    assert adapter_bytes(recipe) == adapter_bytes(undisturbed)
    assert ledger(recipe) == ledger(undisturbed)


@pytest.mark.night
def test_the_whole_tree_killed_and_the_newest_checkpoint_torn(
    joined: str, undisturbed: Recipe, tiny_model: Path, folder: Path
) -> None:
    recipe = small_recipe("torn", tiny_model, folder, **CHANGES)
    command = muster_run(recipe, folder)
    wait_for_step(recipe, 35, command)
    command.kill(workers(recipe))
    run = run_of(recipe)
    status = read_status(run)
    assert status.state == "interrupted"
    newest = status.checkpoints[-1]
    torn = Path(newest.uri, "optimizer.safetensors")
    torn.write_bytes(torn.read_bytes()[:-100])
    again = muster_run(recipe, folder)
    assert again.wait() == 0, again.output()
    skipped = [e for e in read_rows(run, layout.EVENTS) if e["event"] == "skipped_checkpoint"]
    assert [e["step"] for e in skipped] == [newest.step]
    assert adapter_bytes(recipe) == adapter_bytes(undisturbed)
