"""What a person sees of a run: lines that fit, news that come once, and nothing that holds the driver up."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from tests.storage.doubles import faulty, unreachable
from trainer.data.blocks import BadRow, Counts
from trainer.data.prepare.prepare import PreparationProgress
from trainer.progress.lines import BEAT_S, PLAIN_S, Plain, ProgressLines
from trainer.progress.texts import (
    GAP,
    AttemptStatus,
    age,
    curve,
    drawn,
    duration,
    event_text,
    placed,
    size,
    watched_text,
)
from trainer.progress.view import LOOK_S, View, standing_of
from trainer.run.events import Event
from trainer.run.metrics import StepMetrics
from trainer.storage import Storage, open_storage
from trainer.storage.store import to_json

STANDING = AttemptStatus(
    120, 1000, 1.23456, 12345.6, 3725.0, 4, 100,
    saved_ago_s=34.0, losses=(3.0, 2.5, 2.0, 1.8, 1.6, 1.5, 1.4, 1.3, 1.2), eval_loss=1.5, lr=2e-4, grad_norm=0.534,
    mfu=0.41, memory_bytes=13 * 2**30, epoch=1, samples=3840, hosts=("a", "a", "b", "b"),
)  # fmt: skip
HUGE = AttemptStatus(99_999, 100_000, 123.4567, 9_876_543.0, 359_999.0, 512, 99_990, losses=(1.0, 2.0) * 500)
BARE = AttemptStatus(0, 0, math.nan, 0.0, 0.0, 0, None)


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


def test_four_lines_say_everything() -> None:
    assert drawn(STANDING, 80).splitlines() == [
        "step 120/1000  12%  ETA 1:02:05  " + "━" * 4 + "─" * 36,
        "loss 1.2346  eval 1.5000  lr 2.00e-04  gradient 0.534  █▆▄▃▃▂▂▁▁",
        "12,346 tokens/s  MFU 41%  memory 13 GiB  epoch 2, 3,840 samples",
        "saved 100 (0:34 ago)  4 workers: 2 on a, 2 on b",
    ]


@pytest.mark.parametrize("standing", [STANDING, HUGE, BARE])
def test_the_lines_fit_every_width_and_keep_the_step(standing: AttemptStatus) -> None:
    for width in range(8, 220):
        lines = drawn(standing, width).splitlines()
        assert [len(line) <= width for line in lines] == [True] * 4
        assert lines[0].startswith(f"step {standing.step}"[:width])
        assert lines[1].startswith("loss")


def test_a_run_that_does_not_train_has_no_speed_and_no_end() -> None:
    ended = replace(STANDING, running=False)
    assert drawn(ended, 80).splitlines() == [
        "step 120/1000  12%  " + "━" * 4 + "─" * 36,
        "loss 1.2346  eval 1.5000  lr 2.00e-04  gradient 0.534  █▆▄▃▃▂▂▁▁",
        "memory 13 GiB  epoch 2, 3,840 samples",
        "saved 100 (0:34 ago)  4 workers: 2 on a, 2 on b",
    ]
    assert not {"tokens", "mfu", "eta"} & ended.parts().keys()


def test_a_narrow_terminal_loses_the_lesser_values_first() -> None:
    assert drawn(STANDING, 40).splitlines() == [
        "step 120/1000  12%  ETA 1:02:05  ───────",
        "loss 1.2346  eval 1.5000  lr 2.00e-04",
        "12,346 tokens/s  MFU 41%  memory 13 GiB",
        "saved 100 (0:34 ago)",
    ]
    assert drawn(STANDING, 16).splitlines() == ["step 120/1000", "loss 1.2346", "12,346 tokens/s", "saved 100 (0:34 "]


def test_what_is_not_known_is_left_out() -> None:
    assert drawn(BARE, 80).splitlines() == [
        "step 0/0  0%  ETA 0:00  " + "─" * 40,
        "loss nan",
        "0 tokens/s  epoch 1, 0 samples",
        "not saved yet  0 workers",
    ]


def test_the_bar_fills_with_the_steps() -> None:
    def bar(step: int) -> tuple[int, int]:
        line = drawn(AttemptStatus(step, 100, 1.0, 1.0, 0.0, 1, None), 120)
        return line.count("━"), line.count("─")

    assert bar(0) == (0, 40)
    assert bar(50) == (20, 20)
    assert bar(100) == (40, 0)


def test_a_curve_goes_from_the_lowest_to_the_highest_in_as_many_columns_as_there_are() -> None:
    assert curve([8, 7, 6, 5, 4, 3, 2, 1], 8) == "█▇▆▅▄▃▂▁"
    assert curve([1.0] * 50, 4) == "▁▁▁▁"
    assert curve([1.0, math.nan, 2.0], 9) == "▁█"
    assert curve([1.0], 9) == ""
    assert len(curve(list(range(1999)), 32)) == 32


@pytest.mark.parametrize(
    ("seconds", "text"), [(-3, "0 s"), (59, "59 s"), (61, "1 min"), (7300, "2 h"), (86400 * 12.5, "12 d")]
)
def test_ages(seconds: float, text: str) -> None:
    assert age(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(12, "12 B"), (13 * 2**30, "13 GiB"), (2**45, "32 TiB")])
def test_sizes(count: int, text: str) -> None:
    assert size(count) == text


def test_many_hosts_are_counted() -> None:
    assert placed(["a", "b", "a"]) == "2 on a, 1 on b"
    assert placed([f"h{i}" for i in range(10)]).endswith("1 on h7 and 2 more hosts")


def test_the_time_left_follows_the_middle_step_not_the_odd_one() -> None:
    rows = [step_row(10, step_s=60.0), *(step_row(s, step_s=0.5) for s in (9, 8, 7, 6))]
    assert standing_of([*map(StepMetrics.from_row, rows)], 30, None).left_s == 20 * 0.5
    assert math.isnan(standing_of([StepMetrics.from_row(step_row(3, loss=None))], 30, None).loss)


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
    assert standing.eval_loss == 1.0


def test_a_failure_before_the_first_claim_is_news_of_its_driver(run: Storage) -> None:
    """Workers claim once the model is built: what fails before is told under the attempt before, or under 0."""
    view = View(run, 3, 20, Clock(), driver=2)
    failure = {"attempt": 3, "event": "failure", "time": 5.0, "cause": "out of memory", "retried": True}
    write_rows(run, "events/a000003-driver1-controller-000000.jsonl", {**failure, "writer": "driver1-controller"})
    write_rows(run, "events/a000003-driver22-controller-000000.jsonl", {**failure, "writer": "driver22-controller"})
    view.look(last=True)
    assert view.take_news() == []
    write_rows(run, "events/a000003-driver2-controller-000000.jsonl", {**failure, "writer": "driver2-controller"})
    view.look(last=True)
    assert view.take_news() == ["failure: out of memory; restarting the workers"]


def test_a_resumed_run_was_saved_and_may_have_lost_a_host(run: Storage) -> None:
    """What earlier attempts have left is where the run stands, though no news."""
    start = {"event": "start", "step": 0, "strategy": {"kind": "ddp"}, "writer": "rank0"}
    first = {**start, "attempt": 1, "hosts": ["a", "b", "c"], "time": 10.0}
    saved = {"attempt": 1, "event": "checkpoint", "time": 70.0, "step": 7}
    write_rows(run, "events/a000001-rank0-000000.jsonl", first, saved)
    view = View(run, 1, 20, Clock(), now=lambda: 100.0)
    write_rows(run, "events/a000002-rank0-000000.jsonl", {**start, "attempt": 2, "hosts": ["a", "b"], "time": 90.0})
    write_rows(run, "metrics/a000002-000000.jsonl", step_row(8, attempt=2))
    standing = view.look(last=True)
    assert standing is not None
    assert (standing.saved, standing.saved_ago_s) == (7, 30.0)
    assert view.take_news() == [
        "attempt 2: c lost, continues with 2 of 3, workers 1 on a, 1 on b, ddp, from the first step"
    ]


def test_a_cause_that_was_told_is_not_told_again_at_the_end(run: Storage) -> None:
    view = View(run, 0, 20, Clock(), elsewhere=True)
    failure = {"attempt": 1, "event": "failure", "time": 1.0, "cause": "rank 1 died", "retried": False}
    end = {"attempt": 1, "event": "end", "time": 2.0, "state": "failed"}
    write_rows(run, "events/a000001-driver1-000000.jsonl", failure, {**end, "cause": "rank 1 died"})
    view.look(last=True)
    assert view.take_news() == ["failure: rank 1 died", "failed"]
    write_rows(run, "events/a000002-driver2-000000.jsonl", {**end, "time": 3.0, "cause": "no such file\nmore"})
    view.look(last=True)
    assert view.take_news() == ["failed: no such file"]


def test_steps_trained_again_are_drawn_once(run: Storage) -> None:
    view = View(run, 0, 20, Clock(), now=lambda: 100.0)
    write_rows(run, "metrics/a000001-000000.jsonl", *(step_row(s, loss=float(s)) for s in (1, 2, 3, 4)))
    write_rows(run, "events/a000001-r-000000.jsonl", {"attempt": 1, "event": "checkpoint", "time": 70.0, "step": 2})
    view.look(last=True)
    write_rows(run, "metrics/a000002-000000.jsonl", *(step_row(s, 2, loss=10.0 + s, mfu=0.4) for s in (3, 4, 5)))
    standing = view.look(last=True)
    assert standing is not None
    assert standing.losses == (1.0, 2.0, 13.0, 14.0, 15.0)
    assert (standing.mfu, standing.saved_ago_s) == (0.4, 30.0)


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
    assert view.take_news() == ["the checkpoint of step 5 is skipped: torn"]
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
    plain = Plain(View(run, 0, 20, clock), lambda text: print(text, file=out), clock)

    def at(step: int, seconds: float, *, last: bool = False) -> list[str]:
        write_rows(run, "metrics/a000001-000000.jsonl", *map(step_row, range(1, step + 1)))
        clock.now += seconds
        out.truncate(out.seek(0))
        plain(last=last)
        return out.getvalue().splitlines()

    assert at(1, LOOK_S) == ["step 1/20  loss 2.0000  100 tokens/s  ETA 0:10  2 workers  not saved yet"]
    assert at(2, LOOK_S) == []
    assert at(3, PLAIN_S)[0].startswith("step 3/20")
    assert at(4, 0.0, last=True)[0].startswith("step 4/20")
    assert at(4, PLAIN_S, last=True) == []


def test_the_scores_of_answers_are_beside_the_evaluation_loss(run: Storage) -> None:
    view = View(run, 0, 4, Clock(), now=lambda: 9.0)
    scores = {"eval_exact_match": 0.71875, "eval_f1": 0.5, "eval_answers": 64, "eval_perplexity": 4.5}
    evaluations = [{"attempt": 1, "step": 1, "eval_loss": 1.5, **scores}, {"attempt": 1, "step": 2, "eval_loss": 1.4}]
    write_rows(run, "metrics/a000001-000000.jsonl", step_row(1), step_row(2), *evaluations)
    standing = view.look(last=True)
    assert standing is not None
    assert GAP.join(standing.parts().values()).startswith(
        "step 2/4  loss 2.0000  eval 1.4000  exact match 0.7188  f1 0.5  100 tokens/s"
    )


def test_plain_lines_end_with_what_was_saved_and_have_every_evaluation(run: Storage) -> None:
    clock, out = Clock(), io.StringIO()
    plain = Plain(View(run, 0, 4, clock, now=lambda: 9.0), lambda text: print(text, file=out), clock)

    def line(*rows: dict[str, Any], last: bool = False) -> str:
        write_rows(run, "metrics/a000001-000000.jsonl", *rows)
        clock.now += LOOK_S
        out.truncate(out.seek(0))
        assert plain(last=last)
        return out.getvalue()

    first = [step_row(1), step_row(2)]
    evaluation = {"attempt": 1, "step": 2, "eval_loss": 1.5}
    assert line(*first).startswith("step 2/4  loss 2.0000  100 tokens/s")
    assert line(*first, evaluation).startswith("step 2/4  loss 2.0000  eval 1.5000  100 tokens/s")
    assert line(*first, evaluation) == ""
    all_rows = [*first, evaluation, step_row(3), step_row(4)]
    clock.now += PLAIN_S
    assert line(*all_rows).endswith("not saved yet\n")
    write_rows(run, "events/a000001-rank0-000000.jsonl", {"event": "checkpoint", "attempt": 1, "step": 4, "time": 9.0})
    assert line(*all_rows, last=True) == (
        "step 4/4  loss 2.0000  eval 1.5000  100 tokens/s  ETA 0:00  2 workers  saved 4 (0:00 ago)\n"
    )


def test_a_phase_that_goes_on_is_told_again_less_and_less_often() -> None:
    clock, out = Clock(), io.StringIO()
    progress = ProgressLines(lambda text, style: print(text, file=out), clock)
    progress.repeat()
    progress.phase("starting Ray")
    told = []
    for now in range(120):
        clock.now = float(now)
        before = out.tell()
        progress.repeat()
        if out.tell() > before:
            told.append(now)
    assert out.getvalue().splitlines()[:2] == ["[  0.0 s] starting Ray", f"[{told[0]:5.1f} s] still starting Ray"]
    assert told[:5] == [5, 10, 15, 20, 25]
    progress.within_phase("starting Ray's second node")
    clock.now += 100.0
    progress.repeat()
    assert out.getvalue().splitlines()[-1] == "[219.0 s] starting Ray's second node"
    assert told[-1] - told[-2] > 2 * BEAT_S
    progress.say("something else")
    progress.repeat()
    progress.phase("")
    clock.now += 1000.0
    before = out.tell()
    progress.repeat()
    assert out.tell() == before, "no phase goes on"


def test_the_first_step_ends_the_phase(run: Storage) -> None:
    out = io.StringIO()
    progress = ProgressLines(lambda text, style: print(text, file=out), Clock())
    with progress.training(run, 0, 20, lambda: "loading the model") as show:
        assert not show()
        assert "[  0.0 s] loading the model\n" in out.getvalue()
    write_rows(run, "metrics/a000001-000000.jsonl", step_row(1))
    clock = Clock()
    progress = ProgressLines(lambda text, style: print(text, file=out), clock)
    with progress.training(run, 0, 20, lambda: "loading the model") as show:
        assert show()
        clock.now, before = 1000.0, out.tell()
        progress.repeat()
        assert out.tell() == before


def test_an_epoch_counts_from_one(run: Storage) -> None:
    write_rows(run, "metrics/a000001-000000.jsonl", step_row(1, epoch=0, samples=6))
    standing = View(run, 0, 20, Clock()).look(last=True)
    assert standing is not None
    assert "epoch 1, 6 samples" in drawn(standing, 80)


@pytest.mark.parametrize("part", ["train", "eval"])
def test_prepared_windows_say_which_data_they_are_of(part: str) -> None:
    out = io.StringIO()
    ProgressLines(lambda text, style: print(text, file=out)).prepared(part, PreparationProgress(1, 2, 50, 1200))
    name = {"train": "training", "eval": "evaluation"}[part]
    assert f"{name} data: prepared window 1 of 2: 50 samples, 1,200 tokens" in out.getvalue()


def test_bad_rows_are_named_up_to_a_number() -> None:
    out = io.StringIO()
    counts = Counts(rows=20, samples=11, tokens=40, target_tokens=20, truncated=3, dropped=0, bad_rows=9)
    train = SimpleNamespace(
        windows=[1],
        totals=counts,
        bad_rows=[BadRow("s3://c/a.jsonl", f"line {i}", "broken") for i in range(9)],
        spec=SimpleNamespace(sources=[SimpleNamespace(path="s3://c/*.jsonl")]),
        warnings=[["a column is not read"]],
    )
    ProgressLines(lambda text, style: print(text, file=out)).data(
        SimpleNamespace(train=train, eval=None, total_steps=7)
    )  # type: ignore[arg-type]
    first, *rest = out.getvalue().splitlines()
    assert first == "data: 11 samples, 40 tokens (20 targets), 3 truncated, 9 bad rows; 7 steps"
    assert rest[0] == "warning: left out s3://c/a.jsonl, line 0: broken"
    assert rest[5] == "warning: s3://c/*.jsonl: a column is not read"
    assert rest[-1] == "warning: left out 4 more bad rows"
    assert len(rest) == 7


def test_a_start_names_the_workers_by_host() -> None:
    event = {"event": "start", "attempt": 2, "hosts": ["a", "b", "a"], "strategy": {"kind": "fsdp"}, "step": 0}
    assert event_text(Event.from_row(event)) == "attempt 2: workers 2 on a, 1 on b, fsdp, from the first step"
    assert (
        event_text(Event.from_row({**event, "step": 9}))
        == "attempt 2: workers 2 on a, 1 on b, fsdp, continues after step 9"
    )
    assert event_text(Event.from_row({"event": "checkpoint"})) is None


def test_changed_settings_are_one_line() -> None:
    changes = [
        {"key": "training.micro_batch", "before": 4, "after": 1},
        {"key": "strategy.deepspeed", "after": {"stage": 3, "more": "x" * 90}},
        {"key": "compute.compile", "before": False, "after": True},
    ]
    text = event_text(Event.from_row({"event": "change", "changes": changes}))
    assert text is not None
    assert text.startswith("changed since the attempt before: training.micro_batch 4 → 1, strategy.deepspeed null → {")
    assert text.endswith("x…, compute.compile false → true")
    assert len(text) < 200


def test_a_start_says_what_changed() -> None:
    event = Event.from_row(
        {"event": "start", "attempt": 2, "hosts": ["a", "a"], "strategy": {"kind": "ddp"}, "step": 9}
    )
    said = "workers 2 on a, ddp, continues after step 9"
    assert event_text(event, ("a", "a")) == f"attempt 2: {said}"
    assert event_text(event, ("a", "a", "b", "b")) == f"attempt 2: b lost, continues with 2 of 4, {said}"
    assert event_text(event, ("a",)) == f"attempt 2: 2 in the place of 1, {said}"


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (
            {"event": "resize", "reason": "node n will be taken away"},
            "node n will be taken away: the workers start again",
        ),
        ({"event": "hang", "cause": "nothing has moved"}, "hang: nothing has moved"),
        ({"event": "end", "state": "succeeded", "step": 9}, "succeeded at step 9"),
        ({"event": "end", "state": "failed"}, "failed"),
        ({"event": "stale_checkpoint", "age_s": 61.0}, "no checkpoint was committed for 1:01"),
    ],
)
def test_whoever_watches_from_elsewhere_is_told_more(event: dict[str, Any], text: str) -> None:
    assert str(watched_text(Event.from_row(event))).startswith(text)
