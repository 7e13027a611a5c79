"""A signal at any moment of a run's start ends it with exit code 3, one sentence and nothing left behind."""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.local_runs import LocalRun
from tests.support.training import losses, run_of, small_recipe, write_pairs
from tests.support.waiting import wait_for
from trainer.checkpoint.publish import finished
from trainer.run.lease import read_lease

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
BOUND_S = 20.0
STEPS = 150
TERM, INT, HUP = signal.SIGTERM, signal.SIGINT, signal.SIGHUP


def check_end(run: LocalRun, sent_at: float) -> None:
    code = run.command.wait(BOUND_S + 10)
    took, output = time.monotonic() - sent_at, run.command.output()
    if finished(run_of(run.recipe)) is not None and code == 0:
        return
    assert code == 3, f"exit code {code}\n{output[-3000:]}"
    assert took < BOUND_S, output[-3000:]
    assert output.splitlines()[-1].startswith("muster: interrupted: "), output[-3000:]
    assert output.count("muster: interrupted") == 1
    assert "Traceback" not in output
    assert "***" not in output
    wait_for(lambda: not run.processes(), "no process of the run", timeout_s=10, logs=lambda: str(run.processes()))
    lasting = (f"muster-{os.getuid()}", f"torchinductor_{os.getuid()}")  # what later runs use
    assert [path for path in run.folder.iterdir() if path.name not in lasting] == []
    lease = read_lease(run_of(run.recipe))
    assert lease is None or not lease.may_be_alive()


Moment = Callable[[LocalRun], Callable[[], bool]]
MOMENTS: dict[str, Moment] = {
    "first line": lambda run: run.takes_signals,
    "starting Ray": lambda run: run.said("starting Ray"),
    "gcs_server": lambda run: run.has("gcs_server"),
    "raylet": lambda run: run.has("raylet"),
    "a Ray worker": lambda run: run.has("ray::"),
    "checked": lambda run: run.said("are checked"),
    "preparing": lambda run: run.said("preparing data"),
    "starting workers": lambda run: run.said("starting 2 workers and loading the model"),
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
def started(tiny_model: Path, folder: Path) -> Iterator[LocalRun]:
    changes = {"training.steps": STEPS, "checkpoint.every_steps": 50, "resources": {"workers": 2}}
    run = LocalRun(small_recipe(f"run-{uuid.uuid4().hex[:8]}", tiny_model, folder, **changes), folder)
    yield run
    run.clean()


def send(run: LocalRun, number: signal.Signals, *, twice: bool) -> float:
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
        ("raylet", HUP, True),
        ("checked", INT, False),
        ("starting workers", TERM, False),
        pytest.param("attempt", TERM, True, marks=pytest.mark.night),
    ],
)
def test_a_signal_during_the_start(started: LocalRun, moment: str, number: signal.Signals, twice: bool) -> None:
    started.reach(MOMENTS[moment](started), moment)
    check_end(started, send(started, number, twice=twice))


@pytest.mark.night
@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("number", [INT, TERM, HUP])
@pytest.mark.parametrize("later_s", [0.0, 0.3])
@pytest.mark.parametrize("moment", list(MOMENTS))
def test_a_sweep_of_signals_over_the_start(
    started: LocalRun, moment: str, later_s: float, number: signal.Signals, twice: bool
) -> None:
    started.reach(MOMENTS[moment](started), moment)
    time.sleep(later_s)  # the moment that is tried, not a wait for something
    check_end(started, send(started, number, twice=twice))
