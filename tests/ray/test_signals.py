"""A signal at any moment of a run's start ends it with exit code 3, one sentence and nothing left behind."""

from __future__ import annotations

import shutil
import signal
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.support.jobs import Command, start, write_recipe
from tests.support.training import losses, run_of, small_recipe, write_pairs
from tests.support.waiting import wait_for
from trainer.lease import read_lease
from trainer.publish import finished
from trainer.recipe import Recipe

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
MARK = "MUSTER_TEST_MARK"
BOUND_S = 20.0
REACHED_S = 150.0
STEPS = 150
TERM, INT, HUP = signal.SIGTERM, signal.SIGINT, signal.SIGHUP


class Started:
    """A `muster run` with a Ray of its own, told apart from all other processes by its environment."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe, self._mark = recipe, uuid.uuid4().hex
        self.folder = Path(tempfile.mkdtemp(prefix="mt-", dir="/tmp"))  # Ray's sockets need a short path
        path = write_recipe(recipe, folder)
        environment = {MARK: self._mark, "TMPDIR": str(self.folder), "RAY_ADDRESS": ""}
        self.command: Command = start(["-m", "launcher", "run", path, "--on", "local"], environment)
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
        return bool(caught >> (TERM - 1) & 1)

    def has(self, name: str) -> Callable[[], bool]:
        return lambda: any(name in process.name() for process in self.processes())

    def reach(self, reached: Callable[[], bool], what: str) -> None:
        def passed() -> bool:
            if reached():
                return True
            assert self.command.process.poll() is None, f"ended before {what}\n{self.command.output()[-3000:]}"
            return False

        wait_for(passed, what, timeout_s=REACHED_S, every_s=0.01, logs=self.command.output)

    def check_end(self, sent_at: float) -> None:
        code = self.command.wait(BOUND_S + 10)
        took, output = time.monotonic() - sent_at, self.command.output()
        if finished(run_of(self.recipe)) is not None and code == 0:
            return
        assert code == 3, f"exit code {code}\n{output[-3000:]}"
        assert took < BOUND_S, output[-3000:]
        assert output.splitlines()[-1].startswith("muster: interrupted: "), output[-3000:]
        assert output.count("muster: interrupted") == 1
        assert "Traceback" not in output
        assert "***" not in output
        wait_for(
            lambda: not self.processes(), "no process of the run", timeout_s=10, logs=lambda: str(self.processes())
        )
        assert not list(self.folder.iterdir()), list(self.folder.iterdir())
        lease = read_lease(run_of(self.recipe))
        assert lease is None or not lease.is_alive(time.time())

    def clean(self) -> None:
        for process in self.processes():
            with suppress(psutil.Error):
                process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


Moment = Callable[[Started], Callable[[], bool]]
MOMENTS: dict[str, Moment] = {
    "first line": lambda run: run.takes_signals,
    "starting Ray": lambda run: run.said("starting Ray"),
    "gcs_server": lambda run: run.has("gcs_server"),
    "raylet": lambda run: run.has("raylet"),
    "a Ray worker": lambda run: run.has("ray::"),
    "checking": lambda run: run.said("checking storage"),
    "preparing": lambda run: run.said("preparing data"),
    "starting workers": lambda run: run.said("starting 2 workers"),
    "loading": lambda run: run.said("loading the model"),
    "attempt": lambda run: run.said("attempt 1"),
    "training": lambda run: lambda: max(losses(run.recipe), default=0) >= 3,
    "last step": lambda run: lambda: max(losses(run.recipe), default=0) >= STEPS,
    "finished": lambda run: run.said("finished: "),
}
"""In their order."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("signals")
    write_pairs(made / "data" / "a.jsonl", 90)
    return made


@pytest.fixture
def started(tiny_model: Path, folder: Path) -> Iterator[Started]:
    changes = {"training.steps": STEPS, "checkpoint.every_steps": 50, "resources": {"workers": 2}}
    run = Started(small_recipe(f"run-{uuid.uuid4().hex[:8]}", tiny_model, folder, **changes), folder)
    yield run
    run.clean()


def send(run: Started, number: signal.Signals, *, twice: bool) -> float:
    """As a terminal, a container's runtime or a shell does it: to the command alone. Twice: a second apart."""
    sent_at = time.monotonic()
    run.command.process.send_signal(number)
    if twice:
        time.sleep(1.0)  # what comes at once counts as one
        run.command.process.send_signal(number)  # nothing where it has ended
    return sent_at


@pytest.mark.parametrize(
    ("moment", "number", "twice"),
    [
        ("first line", TERM, False),
        ("gcs_server", TERM, False),
        ("raylet", HUP, True),
        ("checking", INT, False),
        ("starting workers", TERM, False),
        ("loading", HUP, False),
        ("attempt", TERM, True),
    ],
)
def test_a_signal_during_the_start(started: Started, moment: str, number: signal.Signals, twice: bool) -> None:
    started.reach(MOMENTS[moment](started), moment)
    started.check_end(send(started, number, twice=twice))


@pytest.mark.night
@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("number", [INT, TERM, HUP])
@pytest.mark.parametrize("later_s", [0.0, 0.3])
@pytest.mark.parametrize("moment", list(MOMENTS))
def test_a_sweep_of_signals_over_the_start(
    started: Started, moment: str, later_s: float, number: signal.Signals, twice: bool
) -> None:
    started.reach(MOMENTS[moment](started), moment)
    time.sleep(later_s)  # the moment that is tried, not a wait for something
    started.check_end(send(started, number, twice=twice))
