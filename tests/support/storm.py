"""Random kills over one run: what dies, when, and how long until the run takes another step.

The driver's command is started again whenever it has died, as a person or a scheduler would; workers that die are the
driver's own business. Everything that is drawn comes from one seed.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

import psutil

from launcher.monitor.status import read_status
from tests.support.jobs import Command, muster_run, workers
from tests.support.training import losses, run_of
from trainer.checkpoint import read_claims
from trainer.errors import Interrupted
from trainer.recipe import Recipe
from trainer.run import layout
from trainer.run.jsonl import rows_backwards

KINDS = ("worker", "worker", "worker", "every worker", "driver", "whole tree")
STILL_S = 240.0
POLL_S = 0.25
LAST_STEPS = 25


@dataclass
class Storm:
    """What happened. ``recoveries_s`` are the seconds from each kill to the first new step after it; ``steps`` is where
    the run was stopped in the end, however many steps the machine had taken meanwhile."""

    kills: list[str] = field(default_factory=list)
    recoveries_s: list[float] = field(default_factory=list)
    commands: int = 0
    attempts: int = 0
    steps: int = 0
    wall_s: float = 0.0

    def __str__(self) -> str:
        kinds = ", ".join(f"{self.kills.count(kind)} of {kind}" for kind in dict.fromkeys(KINDS))
        recovery = f"{mean(self.recoveries_s):.1f} s" if self.recoveries_s else "none"
        return (
            f"{len(self.kills)} kills ({kinds}), {self.attempts} attempts, {self.commands} commands; "
            f"mean recovery {recovery}, {self.steps} steps, wall {self.wall_s:.0f} s"
        )


def rage(recipe: Recipe, folder: Path, kills: int, seed: int, say: Callable[[str], None] = lambda text: None) -> Storm:
    """Runs ``recipe``, which is longer than anybody waits, through ``kills`` kills and a few steps more, which are
    committed. AssertionError when it does not go on."""
    chance, storm, began = random.Random(seed), Storm(), time.monotonic()
    command = _start(recipe, folder, storm)
    while len(storm.kills) < kills:
        reached = max(losses(recipe), default=0) + chance.randrange(1, 8)
        command = _await_step(recipe, folder, storm, command, reached)
        kind = chance.choice(KINDS)
        before, at = read_claims(run_of(recipe)).attempt, time.monotonic()
        if not _kill(kind, recipe, command, chance):
            continue
        storm.kills.append(kind)
        command = _await_attempt(recipe, folder, storm, command, before)
        storm.recoveries_s.append(time.monotonic() - at)
        say(f"kill {len(storm.kills)}: {kind} after step {reached}, going on after {storm.recoveries_s[-1]:.1f} s")
    _stop(recipe, folder, storm, command)
    storm.attempts, storm.wall_s = read_status(run_of(recipe)).attempts, time.monotonic() - began
    return storm


def _stop(recipe: Recipe, folder: Path, storm: Storm, command: Command) -> None:
    """Ends the run a few steps after where Ctrl-C has stopped it."""
    command.interrupt()
    assert command.wait() == Interrupted.exit_code, command.output()[-3000:]
    storm.steps = read_status(run_of(recipe)).step + LAST_STEPS
    storm.commands += 1
    last = muster_run(recipe, folder, f"training.stop_after={storm.steps}")
    assert last.wait() == Interrupted.exit_code, last.output()[-3000:]


def _start(recipe: Recipe, folder: Path, storm: Storm) -> Command:
    storm.commands += 1
    return muster_run(recipe, folder)


def _alive(recipe: Recipe) -> list[int]:
    """The newest attempt's ranks that live; a pid may be somebody else's by now, so the title is looked at too."""
    found = []
    for pid in workers(recipe):
        with suppress(psutil.NoSuchProcess):
            if "RayTrainWorker" in " ".join(psutil.Process(pid).cmdline()):
                found.append(pid)
    return found


def _kill(kind: str, recipe: Recipe, command: Command, chance: random.Random) -> bool:
    """Whether there was something to kill."""
    alive = _alive(recipe)
    if kind == "worker" and alive:
        return _end(chance.choice(alive))
    if kind == "every worker" and alive:
        return sum(_end(pid) for pid in alive) > 0
    if kind == "driver":
        return _end(command.process.pid)
    if kind == "whole tree":
        command.kill(alive)
        return True
    return False


def _end(pid: int) -> bool:
    try:
        psutil.Process(pid).kill()
    except psutil.NoSuchProcess:
        return False
    return True


def _await_step(recipe: Recipe, folder: Path, storm: Storm, command: Command, step: int) -> Command:
    return _watch(recipe, folder, storm, command, lambda: max(losses(recipe), default=0) >= step, f"step {step}")


def _await_attempt(recipe: Recipe, folder: Path, storm: Storm, command: Command, before: int) -> Command:
    """Until an attempt after ``before`` has taken a step."""

    def going_on() -> bool:
        newest = next(rows_backwards(run_of(recipe), layout.METRICS), {})
        return int(newest.get("attempt", 0)) > before

    return _watch(recipe, folder, storm, command, going_on, f"a step of an attempt after {before}")


def _watch(
    recipe: Recipe, folder: Path, storm: Storm, command: Command, reached: Callable[[], bool], what: str
) -> Command:
    deadline = time.monotonic() + STILL_S
    while not reached():
        assert time.monotonic() < deadline, f"{what}: not within {STILL_S:.0f} s\n{command.output()[-3000:]}"
        code = command.process.poll()
        if code is not None:
            assert code == -signal.SIGKILL, f"{what}: the command ended with {code}\n{command.output()[-3000:]}"
            command = _start(recipe, folder, storm)
        time.sleep(POLL_S)
    return command


def settings() -> tuple[int, int]:
    """(kills, seed) from CHAOS_KILLS and CHAOS_SEED; a seed of its own where none is set."""
    return int(os.environ.get("CHAOS_KILLS", "50")), int(os.environ.get("CHAOS_SEED", random.randrange(10**6)))
