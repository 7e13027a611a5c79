"""A `muster run` with a Ray of its own, whose processes and temporary files can be told from all others."""

from __future__ import annotations

import shutil
import signal
import tempfile
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import psutil

from tests.support.jobs import Command, start, write_recipe
from tests.support.waiting import wait_for
from trainer.recipe import Recipe

MARK = "MUSTER_TEST_MARK"
REACHED_S = 150.0


class LocalRun:
    """A started command, and what belongs to it: its processes have its mark in their environment."""

    def __init__(self, recipe: Recipe, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        self.recipe, self._mark = recipe, uuid.uuid4().hex
        self.folder = Path(tempfile.mkdtemp(prefix="mt-", dir="/tmp"))  # Ray's sockets need a short path
        path = write_recipe(recipe, folder)
        own = {MARK: self._mark, "TMPDIR": str(self.folder), **(environment or {})}
        self.command: Command = start(["-m", "launcher", "run", path, "--on", "local"], own)
        self.pid = self.command.process.pid

    def processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def said(self, text: str) -> Callable[[], bool]:
        return lambda: text in self.command.output()

    def takes_signals(self) -> bool:
        """Whether the program has come as far as its first line: SIGTERM has a handler."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        caught = int(status.split("SigCgt:")[1].split()[0], 16)
        return bool(caught >> (signal.SIGTERM - 1) & 1)

    def has(self, name: str) -> Callable[[], bool]:
        return lambda: any(name in process.name() for process in self.processes())

    def reach(self, reached: Callable[[], bool], what: str) -> None:
        def passed() -> bool:
            if reached():
                return True
            assert self.command.process.poll() is None, f"ended before {what}\n{self.command.output()[-3000:]}"
            return False

        wait_for(passed, what, timeout_s=REACHED_S, every_s=0.01, logs=self.command.output)

    def clean(self) -> None:
        for process in self.processes():
            with suppress(psutil.Error):
                process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
