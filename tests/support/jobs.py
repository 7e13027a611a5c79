"""`muster run` as users start it: a process of its own, watched from outside through the run's storage."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.support.training import losses, run_of
from tests.support.waiting import wait_for
from trainer.recipe import Recipe, dump
from trainer.run import layout
from trainer.run.jsonl import read_rows

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 240


@dataclass
class Command:
    """A started command; ``log`` gets its output."""

    process: subprocess.Popen[bytes]
    log: Path
    started: float

    def wait(self, timeout_s: float = LIMIT_S) -> int:
        try:
            wait_for(lambda: self.process.poll() is not None, "the command's end", timeout_s, logs=self.output)
        except AssertionError:
            self.kill()
            raise
        return self.process.returncode

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def interrupt(self) -> None:
        """Ctrl-C: the whole process group of the terminal gets it."""
        os.killpg(self.process.pid, signal.SIGINT)

    def kill(self, workers: Sequence[int] = ()) -> None:
        """SIGKILL to the command, its descendants and these training workers, which Ray's daemons have started."""
        root = psutil.Process(self.process.pid)
        for victim in [*root.children(recursive=True), root]:
            with suppress(psutil.NoSuchProcess):
                victim.kill()
        for pid in workers:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(20)


def start(arguments: Sequence[str], environment: Mapping[str, str] | None = None, folder: Path = ROOT) -> Command:
    """Starts ``python …`` in a folder, by default the project's root."""
    log = Path(tempfile.mkdtemp(prefix="muster-test-"), "log")
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=folder,
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
    return Command(process, log, time.time())


def write_recipe(recipe: Recipe, folder: Path) -> str:
    path = folder / f"{recipe.name}.yaml"
    path.write_text(dump(recipe))
    return str(path)


def muster_run(recipe: Recipe, folder: Path, *overrides: str) -> Command:
    return start(["-m", "launcher", "run", write_recipe(recipe, folder), *overrides])


def workers(recipe: Recipe) -> list[int]:
    """Pids of the newest attempt's ranks, in the order of the ranks."""
    starts = [e for e in read_rows(run_of(recipe), layout.EVENTS) if e["event"] == "start"]
    pids: list[int] = max(starts, key=lambda e: e["attempt"])["pids"]
    return pids


def wait_for_step(recipe: Recipe, step: int, command: Command) -> None:
    """Until the run's metrics reach ``step``, with the command still running."""

    def reached() -> bool:
        assert command.process.poll() is None, command.output()[-3000:]
        return max(losses(recipe), default=0) >= step

    wait_for(reached, f"step {step} of {recipe.name}", timeout_s=LIMIT_S, every_s=0.2)
