"""What a person sees of a run: lines that fit, news that come once, and nothing that holds the driver up."""

from __future__ import annotations

import io
import math
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from launcher.progress import (
    LOOK_S,
    PLAIN_S,
    LiveLine,
    Plain,
    Progress,
    Standing,
    View,
    drawn,
    duration,
    event_text,
    standing_of,
)
from tests.storage.doubles import faulty, unreachable
from trainer.data.blocks import BadRow, Counts
from trainer.storage import Storage, open_storage
from trainer.storage.store import to_json

STANDING = Standing(120, 1000, 1.23456, 12345.6, 3725.0, 2, 100)
HUGE = Standing(99_999, 100_000, 123.4567, 9_876_543.0, 359_999.0, 512, 99_990)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def run(tmp_path: Any) -> Storage:
    return open_storage(str(tmp_path / "run"))


def write_rows(run: Storage, key: str, *rows: dict[str, Any]) -> None:
    run.write(key, b"".join(to_json(row) for row in rows))


def step_row(step: int, attempt: int = 1, **values: Any) -> dict[str, Any]:
    row = {"attempt": attempt, "step": step, "loss": 2.0, "step_s": 0.5, "tokens_per_s": 100.0, "world_size": 2}
    return {**row, **values}


@pytest.mark.parametrize("width", [64, 80, 200])
def test_two_lines_say_everything(width: int) -> None:
    first, second = drawn(STANDING, width).splitlines()
    assert first.startswith("step 120/1000  ━")
    assert second == "loss 1.2346  12,346 tokens/s  ETA 1:02:05  2 workers  saved 100"


@pytest.mark.parametrize("standing", [STANDING, HUGE, Standing(0, 0, math.nan, 0.0, 0.0, 0, None)])
def test_the_lines_fit_every_width_and_keep_the_step(standing: Standing) -> None:
    for width in range(8, 220):
        lines = drawn(standing, width).splitlines()
        assert [len(line) <= width for line in lines] == [True, True]
        assert lines[0].startswith(f"step {standing.step}"[:width])


def test_a_narrow_terminal_loses_the_lesser_values_first() -> None:
    assert drawn(STANDING, 50).splitlines()[1] == "loss 1.2346  12,346 tokens/s  ETA 1:02:05"
    assert drawn(STANDING, 30).splitlines()[1] == "loss 1.2346  ETA 1:02:05"
    assert drawn(STANDING, 16).splitlines() == ["step 120/1000", "loss 1.2346"]


def test_the_bar_fills_with_the_steps() -> None:
    def bar(step: int) -> tuple[int, int]:
        line = drawn(Standing(step, 100, 1.0, 1.0, 0.0, 1, None), 120)
        return line.count("━"), line.count("─")

    assert bar(0) == (0, 40)
    assert bar(50) == (20, 20)
    assert bar(100) == (40, 0)


def test_the_time_left_follows_the_middle_step_not_the_odd_one() -> None:
    rows = [step_row(10, step_s=60.0), *(step_row(s, step_s=0.5) for s in (9, 8, 7, 6))]
    assert standing_of(rows, 30, None).left_s == 20 * 0.5
    assert math.isnan(standing_of([step_row(3, loss=None)], 30, None).loss)


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3725, "1:02:05")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_view_shows_this_attempt_only(run: Storage) -> None:
    clock = Clock()
    view = View(run, 1, 20, clock)
    write_rows(run, "metrics/a000001-000000.jsonl", step_row(7, attempt=1))
    assert view.look() is None
    write_rows(run, "metrics/a000002-000000.jsonl", step_row(8, attempt=2), {"attempt": 2, "step": 8, "eval_loss": 1.0})
    write_rows(run, "events/a000002-rank0-000000.jsonl", {"attempt": 2, "event": "checkpoint", "time": 1.0, "step": 8})
    assert view.look() is None, "a second look came before its time"
    clock.now += LOOK_S
    standing = view.look()
    assert standing is not None
    assert (standing.step, standing.saved, standing.workers) == (8, 8, 2)


def test_news_come_once_and_in_whatever_part_they_stand(run: Storage) -> None:
    view = View(run, 0, 20, Clock())
    failure = {"attempt": 1, "event": "failure", "time": 2.0, "cause": "rank 1 died", "retried": True, "writer": "b"}
    write_rows(run, "events/a000001-b-000000.jsonl", failure)
    view.look(last=True)
    assert view.take_news() == ["failure: rank 1 died; restarting the workers"]
    # A part that sorts before the one that was read already.
    skipped = {"attempt": 1, "event": "skipped_checkpoint", "time": 1.0, "step": 5, "reason": "torn", "writer": "a"}
    write_rows(run, "events/a000001-a-000000.jsonl", skipped)
    view.look(last=True)
    assert view.take_news() == ["the checkpoint of step 5 is passed over: torn"]
    assert view.take_news() == []


def test_a_storage_that_fails_leaves_the_last_standing() -> None:
    storage, backend = faulty(deadline_s=1.0)
    view = View(storage, 0, 20, Clock())
    write_rows(storage, "metrics/a000001-000000.jsonl", step_row(4))
    before = view.look(last=True)
    backend.before = unreachable
    assert before is not None
    assert view.look(last=True) == before


def test_plain_lines_come_seldom_and_the_last_one_always(run: Storage) -> None:
    clock, out = Clock(), io.StringIO()
    plain = Plain(View(run, 0, 20, clock), Console(file=out, width=200), clock)

    def at(step: int, seconds: float, *, last: bool = False) -> list[str]:
        write_rows(run, "metrics/a000001-000000.jsonl", step_row(step))
        clock.now += seconds
        out.truncate(out.seek(0))
        plain(last=last)
        return out.getvalue().splitlines()

    assert at(1, LOOK_S) == ["step 1/20  loss 2.0000  100 tokens/s  ETA 0:10  2 workers  not saved yet"]
    assert at(2, LOOK_S) == []
    assert at(3, PLAIN_S)[0].startswith("step 3/20")
    assert at(4, 0.0, last=True)[0].startswith("step 4/20")
    assert at(4, PLAIN_S, last=True) == []


@pytest.mark.parametrize("width", [40, 80, 140])
def test_the_live_lines_hold_no_control_characters(width: int) -> None:
    clock = Clock()
    line = LiveLine(clock)

    def shown() -> str:
        console = Console(file=io.StringIO(), width=width, force_terminal=True, no_color=True)
        console.print(line, end="")
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()

    clock.now = 75.0
    assert shown().rstrip("\n") == "waiting for the first step, 1:15"
    line.standing = HUGE
    lines = shown().splitlines()
    assert len(lines) == 2
    assert "\x1b" not in "".join(lines)
    assert max(map(len, lines)) <= width


@pytest.mark.parametrize("terminal", [False, True])
def test_training_shows_the_end_even_of_a_run_that_fails(run: Storage, terminal: bool) -> None:
    out = io.StringIO()
    progress = Progress(Console(file=out, width=100, force_terminal=terminal))

    def train() -> None:
        with progress.training(run, 0, 20) as watch:
            watch()
            write_rows(run, "metrics/a000001-000000.jsonl", step_row(20))
            raise RuntimeError("a worker died")

    with pytest.raises(RuntimeError):
        train()
    assert "step 20/20" in out.getvalue()


def test_bad_rows_are_named_up_to_a_number() -> None:
    out = io.StringIO()
    counts = Counts(rows=20, samples=11, tokens=40, target_tokens=20, truncated=3, dropped=0, bad_rows=9)
    train = SimpleNamespace(
        windows=[1], totals=counts, bad_rows=[BadRow("s3://c/a.jsonl", f"line {i}", "broken") for i in range(9)]
    )
    Progress(Console(file=out, width=200)).data(SimpleNamespace(train=train, eval=None, total_steps=7))  # type: ignore[arg-type]
    first, *rest = out.getvalue().splitlines()
    assert first == "data: 11 samples, 40 tokens (20 targets), 3 truncated, 9 bad rows; 7 steps"
    assert rest[0] == "warning: left out s3://c/a.jsonl, line 0: broken"
    assert rest[-1] == "warning: left out 4 more bad rows"
    assert len(rest) == 6


def test_a_start_names_the_workers_by_host() -> None:
    event = {"event": "start", "attempt": 2, "hosts": ["a", "b", "a"], "strategy": {"kind": "fsdp"}, "step": 0}
    assert event_text(event) == "attempt 2: workers 2 on a, 1 on b, fsdp, from the first step"
    assert event_text({**event, "step": 9}) == "attempt 2: workers 2 on a, 1 on b, fsdp, going on after step 9"
    assert event_text({"event": "checkpoint"}) is None
