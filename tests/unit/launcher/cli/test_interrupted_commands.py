"""Long commands that a signal ends: exit code 3, one sentence, no traceback, nothing left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.support.training import run_of, small_recipe, write_pairs
from tests.support.waiting import wait_for
from trainer.checkpoint import claim_attempt
from trainer.recipe import Recipe, dump
from trainer.run import layout
from trainer.run.frozen import freeze_recipe
from trainer.run.lease import Lease

ROOT = Path(__file__).resolve().parents[4]
MARK = "MUSTER_TEST_MARK"
ROWS = 40_000


class Started:
    """A command in a process group of its own, with a temporary folder of its own."""

    def __init__(self, *words: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="mt-"))
        self.log = self.folder.with_suffix(".log")
        environment = {**os.environ, "TMPDIR": str(self.folder), MARK: self.folder.name}
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *words],
                cwd=ROOT,
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def others(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(MARK) == self.folder.name and process.pid != self.process.pid:
                    found.append(process)
        return found

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def end(self, number: signal.Signals, *, group: bool) -> None:
        """``group``: as a terminal does it, to all of its processes."""
        sent_at = time.monotonic()
        os.killpg(self.process.pid, number) if group else self.process.send_signal(number)
        assert self.process.wait(40) == 3, self.output()
        assert time.monotonic() - sent_at < 20
        assert self.output().splitlines()[-1].startswith("muster: interrupted: "), self.output()
        assert "Traceback" not in self.output()
        wait_for(lambda: not self.others(), "no process of the command")
        assert [path for path in self.folder.iterdir() if not path.name.startswith("torchinductor_")] == []

    def clean(self) -> None:
        for process in [*self.others(), self.process]:
            with suppress(psutil.Error, ProcessLookupError):
                process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.log.unlink()


@pytest.fixture
def recipe(tiny_model: Path, tmp_path: Path) -> Recipe:
    write_pairs(tmp_path / "data" / "a.jsonl", 60)
    return small_recipe("one", tiny_model, tmp_path)


@pytest.fixture
def commands() -> Iterator[list[Started]]:
    begun: list[Started] = []
    yield begun
    for command in begun:
        command.clean()


def wide(folder: Path) -> None:
    """Rows that take long: several windows, of text that is tokenised."""
    write_pairs(folder / "data" / "a.jsonl", ROWS)
    text = (folder / "data" / "a.jsonl").read_text()
    (folder / "data" / "a.jsonl").write_text(text * 20)


@pytest.mark.parametrize(
    ("number", "group"),
    [(signal.SIGINT, True), (signal.SIGTERM, False), pytest.param(signal.SIGHUP, True, marks=pytest.mark.night)],
)
def test_prepare_in_several_processes(
    recipe: Recipe, tmp_path: Path, commands: list[Started], number: signal.Signals, group: bool
) -> None:
    wide(tmp_path)
    path = tmp_path / "one.yaml"
    path.write_text(dump(recipe))
    command = Started("launcher", "prepare", str(path), "--processes", "2")
    commands.append(command)
    wait_for(lambda: len(command.others()) >= 2 or command.process.poll() is not None, "the processes", timeout_s=60)
    assert command.process.poll() is None, command.output()
    command.end(number, group=group)


@pytest.mark.parametrize("words", [("status", "--watch"), ("status", "--watch", "--json"), ("logs", "--follow")])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_whoever_watches_a_run(
    recipe: Recipe, commands: list[Started], words: tuple[str, ...], number: signal.Signals
) -> None:
    run = run_of(recipe)
    lease = Lease.acquire(run)
    freeze_recipe(run, recipe)
    run.write(layout.log_part(claim_attempt(run, lease.driver, {}), 0, 0), b"a line\n")
    command = Started("launcher", words[0], run.url, *words[1:])
    commands.append(command)
    wait_for(lambda: command.output() or command.process.poll() is not None, "what it shows")
    command.end(number, group=True)
    assert "the run itself continues" in command.output()
    lease.release("interrupted")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_quickstart(tmp_path: Path, commands: list[Started], number: signal.Signals) -> None:
    places = [f"storage={tmp_path}/runs", f"model.path={tmp_path}/base"]
    command = Started("launcher.quickstart", *places)
    commands.append(command)
    status = Path(f"/proc/{command.process.pid}/status")

    def takes_signals() -> bool:
        caught = int(status.read_text().split("SigCgt:")[1].split()[0], 16)
        return bool(caught >> (signal.SIGTERM - 1) & 1)

    wait_for(takes_signals, "its first line", every_s=0.01)
    command.end(number, group=True)
