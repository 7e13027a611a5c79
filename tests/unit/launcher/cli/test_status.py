"""`muster status --watch`, `ls`, `logs` and `track`: a run as seen from elsewhere."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from launcher.cli.app import app
from launcher.monitor import watch as watching
from launcher.monitor.logs import follow_logs, print_logs
from launcher.monitor.status import list_runs, read_status
from launcher.monitor.tables import runs_table
from tests.storage.doubles import faulty, unreachable
from tests.support.training import small_recipe
from trainer.errors import InputError, StorageError
from trainer.recipe import dump
from trainer.run import layout
from trainer.run.events import FailureEvent, StartEvent
from trainer.run.jsonl import Events, JsonLinesWriter, read_rows
from trainer.run.lease import Holder, LeaseRecord, to_row
from trainer.storage import Storage, open_storage

START = 1_000_000.0
HOLDER = Holder("another-host", "boot/1", 4711, 1000.0, None)


def hold(run: Storage, state: str, at: float) -> None:
    run.write_json(layout.LEASE, to_row(LeaseRecord(1, state, HOLDER, at, 7)))


def write_steps(run: Storage, attempt: int, steps: range, workers: int = 2) -> None:
    lines = JsonLinesWriter(run, layout.metrics_part(attempt))
    for step in steps:
        row = {"attempt": attempt, "step": step, "total_steps": 9, "loss": 10.0 - step, "time": START + step}
        lines.add({**row, "step_s": 2.0, "tokens_per_s": 512.0, "lr": 1e-4, "world_size": workers, "samples": 8 * step})
    lines.close()


def started(run: Storage, attempt: int, step: int, hosts: list[str]) -> None:
    events = Events(run, attempt, "rank0")
    events.emit(StartEvent(step=step, hosts=tuple(hosts), strategy={"kind": "ddp"}))
    events.close()


def began(run: Storage) -> Storage:
    run.write(layout.RECIPE, b"name: x\n")
    hold(run, "running", START)
    started(run, 1, 0, ["a", "a", "b"])
    write_steps(run, 1, range(1, 5), workers=3)
    return run


class Passing:
    """A clock that a sleep moves, and what happens meanwhile."""

    def __init__(self, *happens: Callable[[], object]) -> None:
        self.now, self._happens = START, list(happens)

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self._happens:
            self._happens.pop(0)()


def watched(run: Storage, clock: Passing, *, terminal: bool) -> str:
    out = io.StringIO()
    console = Console(file=out, width=90, force_terminal=terminal, no_color=True)
    watching.watch_run(run, console, now=clock, sleep=clock.sleep)
    return out.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_a_watched_run_loses_a_node_and_ends(terminal: bool) -> None:
    run, _ = faulty()
    began(run)

    def lose_a_node() -> None:
        started(run, 2, 3, ["a", "a"])
        write_steps(run, 2, range(4, 10))

    clock = Passing(lose_a_node, lambda: hold(run, "succeeded", START + 4))
    shown = watched(run, clock, terminal=terminal)
    for text in ("attempt 1: workers 2 on a, 1 on b, ddp", "b lost, continues with 2 of 3", "step 9/9", "succeeded"):
        assert text in shown
    if terminal:
        for text in ("step 4/9", "running", "1.0000", "lr 1.00e-04", "512 tokens/s", "█", "72 samples", "2 on a"):
            assert text in shown
    else:
        assert shown.splitlines()[-1] == ("succeeded  step 9/9  loss 1.0000  lr 1.00e-04  2 workers  not saved yet")


def test_a_watch_outlives_a_storage_that_is_away() -> None:
    run, backend = faulty(deadline_s=1.0)
    began(run)

    def away() -> None:
        backend.before = unreachable

    def back() -> None:
        backend.before = lambda verb, path: None
        hold(run, "failed", START)

    assert "failed" in watched(run, Passing(away, back), terminal=True)


def test_an_interrupted_run_is_watched_until_it_goes_on() -> None:
    run, _ = faulty()
    began(run)
    hold(run, "interrupted", START)
    clock = Passing(lambda: hold(run, "running", START + 2), lambda: hold(run, "succeeded", START + 4))
    shown = watched(run, clock, terminal=True)
    assert shown.index("interrupted") < shown.index("running") < shown.index("succeeded")


def test_a_watch_in_json_is_a_line_per_change(monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = faulty()
    began(run)
    monkeypatch.setattr(time, "time", lambda: START)
    lines: list[str] = []
    clock = Passing(lambda: None, lambda: hold(run, "succeeded", START))
    watching.watch_json(run, lines.append, clock.sleep)
    assert [json.loads(line)["state"] for line in lines] == ["running", "succeeded"]


def test_a_driver_that_is_heard_of_again_is_no_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lease is renewed every 3 s, which says nothing new; nor does a storage that is away for a while."""
    run, backend = faulty(deadline_s=1.0)
    began(run)
    monkeypatch.setattr(time, "time", lambda: START)
    lines: list[str] = []

    def away() -> None:
        backend.before = unreachable

    def back() -> None:
        backend.before = lambda verb, path: None
        write_steps(run, 2, range(5, 6))

    renewed = [lambda: hold(run, "running", START + 3), lambda: hold(run, "running", START + 6)]
    clock = Passing(*renewed, away, back, lambda: hold(run, "failed", START))
    watching.watch_json(run, lines.append, clock.sleep)
    assert [(told["state"], told["step"]) for told in map(json.loads, lines)] == [
        ("running", 4), ("running", 5), ("failed", 5),
    ]  # fmt: skip


CAUSE = (
    "rank 1 on b: step 3, forward of micro-batch 1: OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"
)
FAILED: dict[str, Any] = {
    "rank": 1,
    "host": "b",
    "phase": None,
    "cause": CAUSE,
    "trace": "  File x.py, line 3",
    "advice": "  likely: full\n  next:   plan",
    "retried": False,
}


def failing(run: Storage, attempt: int = 1, **fields: Any) -> None:
    events = Events(run, attempt, "driver1-controller")
    events.emit(FailureEvent(**{"step": None, **FAILED, **fields}))
    events.close()


@pytest.mark.parametrize("terminal", [True, False])
def test_a_watch_ends_with_the_whole_failure(terminal: bool) -> None:
    run, _ = faulty()
    began(run)

    def fail() -> None:
        failing(run)
        hold(run, "failed", START)

    shown = watched(run, Passing(fail), terminal=terminal)
    told = shown[shown.rindex("failure ") :].splitlines()
    assert [line.rstrip() for line in told[1:]] == [CAUSE, "  File x.py, line 3", "  likely: full", "  next:   plan"]


def test_of_an_event_nothing_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the output is a pipe, of 80 columns."""
    monkeypatch.setattr("trainer.run.lease.GLANCE_S", 0.0)
    run = open_storage(str(tmp_path / "run"))
    began(run)
    failing(run, retried=True)
    out = io.StringIO()
    Console(file=out, width=80).print(watching.Watch(run).render(80))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    shown = " ".join(line.strip() for line in lines)
    assert f"failure: {CAUSE}; restarting the workers" in shown
    done: Any = CliRunner().invoke(app, ["status", run.url])
    assert CAUSE in done.output.splitlines()
    assert "after which the workers were started again" in done.output


def test_a_failure_before_the_first_attempt_is_shown() -> None:
    run, _ = faulty()
    run.write(layout.RECIPE, b"name: x\n")
    hold(run, "failed", START)
    failing(run, attempt=0)
    watch = watching.Watch(run, lambda: START)
    assert [text for _, text in watch.events] == [f"failure: {CAUSE}"]
    assert watch.standing is None


def test_a_list_shows_progress_losses_and_age() -> None:
    storage, _ = faulty()
    began(storage.child("one"))
    out = io.StringIO()
    running = replace(read_status(storage.child("one"), now=START), metrics={"loss": 6.0, "eval_loss": 7.5})
    Console(file=out, width=120).print(runs_table([running], START + 100))
    row = next(line for line in out.getvalue().splitlines() if "one" in line).split()
    assert row == ["one", "running", "4/9", "44%", "6.0000", "7.5000", "1", "min", "3", "0"]


def test_the_age_is_that_of_the_last_step_or_of_the_end() -> None:
    run, _ = faulty()
    began(run)
    assert read_status(run, now=START).seen_at == START + 4
    hold(run, "failed", START + 60)
    assert read_status(run, now=START + 90).seen_at == START + 60


def test_runs_are_read_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, each request of 300 runs would be waited for."""
    storage, backend = faulty()
    monkeypatch.setattr("launcher.monitor.status.GLANCE_S", 0.0)
    for i in range(300):
        began_quietly(storage.child(f"r{i:03d}"))
    together, lock, most = [0], threading.Lock(), [0]

    def request(verb: str, path: str) -> None:
        with lock:
            together[0] += 1
            most[0] = max(most[0], together[0])
        time.sleep(0.005)
        with lock:
            together[0] -= 1

    backend.before = request
    assert len(list_runs(storage)) == 300
    assert most[0] >= 8


def began_quietly(run: Storage) -> None:
    run.write(layout.RECIPE, b"name: x\n")
    run.write_json(layout.LEASE, to_row(LeaseRecord(1, "running", HOLDER, START, 7)))
    run.write("metrics/a000001-000000.jsonl", b'{"attempt": 1, "step": 3, "loss": 1.0}\n')


def log_of(run: Storage, attempt: int, rank: int, text: str, offset: int = 0) -> None:
    run.write(layout.log_part(attempt, rank, offset), text.encode())


def printed(run: Storage, rank: int | None, attempt: int | None) -> str:
    out = io.BytesIO()
    print_logs(run, rank, attempt, out)
    return out.getvalue().decode()


def test_logs_are_those_of_the_newest_attempt_rank_by_rank() -> None:
    run, _ = faulty()
    log_of(run, 1, 0, "old\n")
    for rank in (0, 1):
        log_of(run, 2, rank, f"new {rank}\n")
    assert printed(run, None, None) == "==> rank 0 of attempt 2 <==\nnew 0\n==> rank 1 of attempt 2 <==\nnew 1\n"
    assert printed(run, 1, None) == "new 1\n"
    assert printed(run, 0, 1) == "old\n"


@pytest.mark.parametrize(
    ("rank", "attempt", "text"),
    [
        (7, None, "no log of rank 7 of attempt 2: there are logs of 0$"),
        (None, 3, "attempt 3: there are logs of 1, 2"),
    ],
)
def test_logs_that_are_not_there(rank: int | None, attempt: int | None, text: str) -> None:
    run, _ = faulty()
    with pytest.raises(InputError, match="has no logs"):
        printed(run, rank, attempt)
    log_of(run, 1, 0, "old\n")
    log_of(run, 2, 0, "new\n")
    with pytest.raises(InputError, match=text):
        printed(run, rank, attempt)


def test_logs_are_followed_over_attempts_until_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = faulty()
    monkeypatch.setattr(time, "time", lambda: START)
    hold(run, "running", START)

    def second_attempt() -> None:
        log_of(run, 2, 0, "again\n")
        log_of(run, 2, 1, "the other\n")

    def end() -> None:
        log_of(run, 2, 0, "again\nlast\n")
        hold(run, "succeeded", START)

    clock = Passing(
        lambda: log_of(run, 1, 0, "first\n"), lambda: log_of(run, 1, 0, "first\nsecond\n"), second_attempt, end
    )
    out = io.BytesIO()
    follow_logs(run, None, None, out, clock.sleep)
    assert out.getvalue().decode() == "first\nsecond\nrank 0: again\nrank 1: the other\nrank 0: last\n"


def followed(run: Storage, rank: int | None, attempt: int | None, *happens: Callable[[], object]) -> str:
    out = io.BytesIO()
    follow_logs(run, rank, attempt, out, Passing(*happens).sleep)
    return out.getvalue().decode()


def test_a_rank_whose_log_comes_later_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keepers store at moments of their own: after a restart rank 0's part is there before the others'."""
    run, _ = faulty()
    monkeypatch.setattr(time, "time", lambda: START)
    hold(run, "running", START)
    log_of(run, 1, 0, "zero\n")
    shown = followed(
        run,
        1,
        None,
        lambda: log_of(run, 1, 1, "one\n"),
        lambda: log_of(run, 2, 0, "zero again\n"),
        lambda: log_of(run, 1, 1, "one\nits last words\n"),
        lambda: log_of(run, 2, 1, "one again\n"),
        lambda: hold(run, "succeeded", START),
    )
    assert shown == "one\nits last words\none again\n"


def test_an_attempt_is_waited_for_until_the_run_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = faulty()
    monkeypatch.setattr(time, "time", lambda: START)
    hold(run, "running", START)
    log_of(run, 1, 0, "first\n")
    end = [lambda: log_of(run, 3, 0, "third\n"), lambda: hold(run, "failed", START)]
    assert followed(run, None, 2, lambda: log_of(run, 2, 0, "second\n"), *end) == "second\n"
    with pytest.raises(InputError, match="no log of attempt 7: there are logs of 1, 2, 3"):
        followed(run, None, 7)
    hold(run, "running", START)
    with pytest.raises(InputError, match="no log of rank 5 of attempt 3"):
        followed(run, 5, None, lambda: hold(run, "failed", START))


def test_a_follower_outlasts_a_storage_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    run, backend = faulty(deadline_s=1.0)
    monkeypatch.setattr(time, "time", lambda: START)
    hold(run, "running", START)
    log_of(run, 1, 0, "before\n")

    def away() -> None:
        backend.before = unreachable

    def back() -> None:
        backend.before = lambda verb, path: None
        log_of(run, 1, 0, "before\nafter\n")

    assert followed(run, None, None, away, back, lambda: hold(run, "succeeded", START)) == "before\nafter\n"
    backend.before = unreachable
    with pytest.raises(StorageError):
        followed(run, None, None)


def test_a_run_that_has_ended_is_sent_to_a_tracker_later(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    recipe = small_recipe("late", tmp_path / "model", tmp_path)
    run = open_storage(recipe.run_uri)
    run.write(layout.RECIPE, dump(recipe).encode())
    write_steps(run, 1, range(1, 6))
    answers = [invoked(run, *arguments) for arguments in ([], ["tracking=[tensorboard]"], ["tracking=[tensorboard]"])]
    assert [code for code, _ in answers] == [2, 0, 0]
    assert "names no tracker" in answers[0][1]
    assert "tensorboard: 5 rows of metrics sent" in answers[1][1]
    assert "tensorboard: 0 rows of metrics sent" in answers[2][1]
    hold(run, "running", time.time())
    code, said = invoked(run, "tracking=[tensorboard]")
    assert (code, "is running" in said) == (2, True)
    assert len(read_rows(run, layout.METRICS)) == 5


def invoked(run: Storage, *arguments: str) -> tuple[int, str]:
    done: Any = CliRunner().invoke(app, ["track", run.url, *arguments])
    code = getattr(done.exception, "exit_code", None) or done.exit_code
    return code, f"{done.output}{done.exception or ''}"
