"""Every way to die under torchrun, where rank 0 is the driver: what the command says, and that it goes on by itself.

Under Ray the same deaths are in tests/ray (test_recovery, test_chaos); a hang is in test_hang.
"""

from __future__ import annotations

import re
import resource
import signal
from pathlib import Path

import psutil
import pytest

from launcher.monitor.status import read_status
from tests.support.jobs import Command, start, wait_for_step
from tests.support.training import (
    adapter_bytes,
    ledger,
    prepare,
    run_of,
    small_recipe,
    train_in_processes,
    write_pairs,
)
from tests.support.waiting import free_port, wait_for
from trainer.recipe import Recipe
from trainer.run.frozen import freeze_recipe
from trainer.storage import open_storage

pytestmark = pytest.mark.timeout(240)
CHANGES = {"training.steps": 240, "checkpoint.every_steps": 10}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("dying")
    write_pairs(made / "data" / "a.jsonl", 90)
    return made


@pytest.fixture(scope="module")
def undisturbed(tiny_model: Path, folder: Path) -> Recipe:
    recipe = small_recipe("undisturbed", tiny_model, folder, **CHANGES)
    train_in_processes([recipe], 2)
    return recipe


def begun(name: str, model: Path, folder: Path) -> Recipe:
    recipe = small_recipe(name, model, folder, **CHANGES)
    prepare(recipe, open_storage(recipe.storage))
    freeze_recipe(run_of(recipe), recipe)
    return recipe


def torchrun(recipe: Recipe, *more: str) -> Command:
    port = f"--master_port={free_port()}"
    run = ["-m", "torch.distributed.run", "--nproc_per_node=2", port, "-m", "trainer", run_of(recipe).url]
    return start([*run, *more])


def rank(command: Command, number: int) -> psutil.Process:
    """The training process of a rank below the started command."""
    for child in psutil.Process(command.process.pid).children(recursive=True):
        if child.environ().get("RANK") == str(number):
            return child
    raise AssertionError(f"rank {number} is not running:\n{command.output()[-2000:]}")


@pytest.mark.night  # by day, tests/ray kills a worker and test_local one without Ray
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_group_and_the_same_command_goes_on(
    victim: int, undisturbed: Recipe, tiny_model: Path, folder: Path
) -> None:
    recipe = begun(f"rank-{victim}-killed", tiny_model, folder)
    command = torchrun(recipe)
    wait_for_step(recipe, 15, command)
    rank(command, victim).kill()
    assert command.wait(60) == 1
    if victim != 0:  # rank 0 is left, and knows what its own failure followed from
        assert "another worker died" in command.output()
        assert "Traceback" not in command.output().partition("muster: rank 0 on")[2].partition("next:")[0]
        failure = read_status(run_of(recipe)).failure
        assert failure is not None
        assert (failure["rank"], failure["retried"]) == (0, False)
    again = torchrun(recipe)
    assert again.wait(120) == 0, again.output()
    assert adapter_bytes(recipe) == adapter_bytes(undisturbed)
    assert ledger(recipe) == ledger(undisturbed)


@pytest.mark.night  # by day, a terminated `muster run`
def test_a_terminated_rank_commits_and_says_that_it_can_go_on(
    undisturbed: Recipe, tiny_model: Path, folder: Path
) -> None:
    recipe = begun("terminated", tiny_model, folder)
    command = torchrun(recipe)
    wait_for_step(recipe, 15, command)
    rank(command, 1).send_signal(signal.SIGTERM)
    assert command.wait(60) != 0
    assert "which is committed" in command.output()
    status = read_status(run_of(recipe))
    assert status.state == "interrupted"
    assert status.checkpoints[-1].step == status.step
    again = torchrun(recipe)
    assert again.wait(120) == 0, again.output()
    again_says = again.output()
    assert "] preparing data" in again_says
    assert re.search(rf"^attempt 2: workers 2 on .*, continues after step {status.step},", again_says, re.MULTILINE)
    assert f"step {status.total_steps}/{status.total_steps}  loss " in again_says
    learned, chat, report, serve = again_says.splitlines()[-4:]
    assert re.fullmatch(r"loss \S+ → \S+, 240 steps, \d:\d\d, [\d,]+ tokens", learned)
    assert (chat, report) == (f"muster chat --run {recipe.run_uri}", f"muster report {recipe.run_uri}")
    assert serve.startswith("vllm serve ")
    assert adapter_bytes(recipe) == adapter_bytes(undisturbed)


@pytest.mark.night
def test_a_stopped_driver_is_overtaken_and_fenced_when_it_wakes(
    undisturbed: Recipe, tiny_model: Path, folder: Path
) -> None:
    recipe = begun("stopped", tiny_model, folder)
    asleep = torchrun(recipe)
    wait_for_step(recipe, 15, asleep)
    processes = [rank(asleep, 0), rank(asleep, 1)]
    for process in processes:
        process.suspend()
    committed = max((c.step for c in read_status(run_of(recipe)).checkpoints), default=0)
    second = torchrun(recipe, "--takeover")
    wait_for(lambda: read_status(run_of(recipe)).attempts == 2, "the second driver's attempt", timeout_s=60)
    for process in processes:
        process.resume()
    assert asleep.wait(60) != 0
    assert "taken over" in asleep.output() or "which is committed" in asleep.output()
    assert second.wait(120) == 0, second.output()
    assert adapter_bytes(recipe) == adapter_bytes(undisturbed)
    assert ledger(recipe) == ledger(undisturbed)
    final = read_status(run_of(recipe))
    assert (final.state, final.checkpoints[-1].step) == ("succeeded", 240)
    assert final.checkpoints[0].step > committed


@pytest.mark.night
def test_out_of_memory_is_a_death_like_any_other(undisturbed: Recipe, tiny_model: Path, folder: Path) -> None:
    """A limit on the address space stands for a full host: what a rank allocates next fails inside the training."""
    recipe = begun("out-of-memory", tiny_model, folder)
    command = torchrun(recipe)
    wait_for_step(recipe, 15, command)
    resource.prlimit(rank(command, 1).pid, resource.RLIMIT_AS, (2**20, 2**20))
    assert command.wait(90) == 1
    failure = read_status(run_of(recipe)).failure
    assert failure is not None
    again = torchrun(recipe)
    assert again.wait(120) == 0, again.output()
    assert adapter_bytes(recipe) == adapter_bytes(undisturbed)
