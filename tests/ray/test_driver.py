"""What happens to the driver of a run on Ray, and what its command says."""

from __future__ import annotations

import re
import signal
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from launcher.monitor.status import read_status
from tests.support.jobs import muster_run, wait_for_step, workers
from tests.support.training import adapter_bytes, ledger, run_of, small_recipe, train_in_processes, write_pairs
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
CHANGES = {"training.steps": 200, "checkpoint.every_steps": 10, "resources": {"workers": 2}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_pairs(tmp_path / "data" / "a.jsonl", 90)
    return tmp_path


def test_terminated_it_commits_and_ends_as_interrupted(joined: str, tiny_model: Path, folder: Path) -> None:
    recipe = small_recipe("terminated", tiny_model, folder, **CHANGES)
    command = muster_run(recipe, folder)
    wait_for_step(recipe, 15, command)
    command.process.send_signal(signal.SIGTERM)
    assert command.wait(60) == 3, command.output()
    status = read_status(run_of(recipe))
    assert status.state == "interrupted"
    assert status.checkpoints[-1].step == status.step


@pytest.mark.night
def test_stopped_it_is_overtaken_and_gives_up_when_it_wakes(joined: str, tiny_model: Path, folder: Path) -> None:
    recipe = small_recipe("stopped", tiny_model, folder, **CHANGES)
    undisturbed = small_recipe("undisturbed", tiny_model, folder, **CHANGES)
    train_in_processes([undisturbed], 2)
    asleep = muster_run(recipe, folder)
    wait_for_step(recipe, 15, asleep)
    asleep.process.send_signal(signal.SIGSTOP)
    second = muster_run(recipe, folder, "--takeover")
    wait_for(lambda: read_status(run_of(recipe)).attempts == 2, "the second driver's attempt", timeout_s=120)
    asleep.process.send_signal(signal.SIGCONT)
    assert asleep.wait(60) == 1, asleep.output()
    assert "another driver has taken" in asleep.output()
    assert second.wait(120) == 0, second.output()
    assert adapter_bytes(recipe) == adapter_bytes(undisturbed)
    assert ledger(recipe) == ledger(undisturbed)
    assert read_status(run_of(recipe)).state == "succeeded"


@pytest.mark.night
def test_of_several_starts_in_the_same_moment_one_trains(joined: str, tiny_model: Path, folder: Path) -> None:
    recipe = small_recipe("several", tiny_model, folder, **{"training.steps": 60, "resources": {"workers": 2}})
    commands = [muster_run(recipe, folder) for _ in range(4)]
    codes = sorted(command.wait() for command in commands)
    assert codes == [0, 2, 2, 2], [command.output()[-1000:] for command in commands]
    for command in commands:
        if command.process.returncode == 2:
            assert re.search(r"process \w+ on \S+ is starting|holds .* and is alive|took", command.output())
    assert len(ledger(recipe)) == 60 * 3
    assert read_status(run_of(recipe)).state == "succeeded"


@pytest.mark.night
@pytest.mark.parametrize("workers_", [1, 2])
def test_a_worker_that_stands_still_for_a_minute_costs_nothing(
    joined: str, tiny_model: Path, folder: Path, workers_: int
) -> None:
    """A lone worker goes on; of several, the others have it replaced."""
    changes = {**CHANGES, "resources": {"workers": workers_}}
    recipe, undisturbed = (small_recipe(name, tiny_model, folder, **changes) for name in ("still", "undisturbed"))
    train_in_processes([undisturbed], workers_)
    command = muster_run(recipe, folder)
    wait_for_step(recipe, 15, command)
    still = psutil.Process(workers(recipe)[-1])
    still.suspend()
    time.sleep(60)  # the case itself: longer than the hang detector's patience
    with suppress(psutil.NoSuchProcess):
        still.resume()
    assert command.wait() == 0, command.output()
    assert adapter_bytes(recipe) == adapter_bytes(undisturbed)
    assert ledger(recipe) == ledger(undisturbed)
