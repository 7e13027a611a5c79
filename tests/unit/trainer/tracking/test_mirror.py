"""What a run has written down reaches its trackers, each step once, whatever breaks in between."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest

from tests.storage.doubles import Died, faulty, unreachable
from tests.support.training import small_recipe
from trainer.errors import Interrupted
from trainer.recipe.trackers import TRACKERS
from trainer.run import layout
from trainer.run.jsonl import JsonLinesWriter
from trainer.run.jsonl_tail import JsonLinesTail
from trainer.run.metrics import read_metrics_row
from trainer.storage import Storage
from trainer.tracking import Mirror, Point, TrackedRun, Watermark, tracked
from trainer.tracking.base import point_of

NAME = "tensorboard"  # stands in for any: what is loaded under the name is a fake


class Server:
    """What a tracker's server has of its curves; ``exact``: it can be asked."""

    def __init__(self, *, exact: bool = False) -> None:
        self.exact = exact
        self.curves: dict[str, list[Point]] = {}
        self.states: list[str] = []
        self.fails: list[BaseException] = []
        self.opened: list[TrackedRun] = []

    def __call__(self, curve: TrackedRun) -> FakeTracker:
        self._fail()
        self.opened.append(curve)
        return FakeTracker(self, self.curves.setdefault(curve.id, []))

    def _fail(self) -> None:
        if self.fails:
            raise self.fails.pop()

    def steps(self) -> list[tuple[int, str]]:
        (points,) = self.curves.values()
        return [(p.step, p.part) for p in points]


class FakeTracker:
    def __init__(self, server: Server, points: list[Point]) -> None:
        self._server, self._points = server, points

    def last_mark(self) -> Watermark | None:
        if not self._server.exact:
            return None
        return max((p.mark for p in self._points), default=Watermark(0, 0))

    def write(self, points: Sequence[Point]) -> None:
        self._server._fail()
        self._points += points

    def close(self, state: str) -> None:
        self._server.states.append(state)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    made = Server()
    monkeypatch.setattr(TRACKERS, "load", lambda name: made)
    return made


def recipe_of(tmp_path: Any, **changes: Any) -> Any:
    return small_recipe("followed", tmp_path / "model", tmp_path, tracking=[NAME], **changes)


def write_steps(run: Storage, attempt: int, *steps: int, loss: float = 1.0, evaluated: Sequence[int] = ()) -> None:
    lines = JsonLinesWriter(run, layout.metrics_part(attempt))
    for step in steps:
        lines.add({"attempt": attempt, "step": step, "total_steps": 9, "loss": loss, "lr": None})
        if step in evaluated:
            lines.add({"attempt": attempt, "step": step, "eval_loss": loss, "eval_tokens": 5})
    lines.close()


def mirror(run: Storage, recipe: Any) -> Mirror:
    return Mirror(NAME, recipe, run)


def test_a_feed_gives_each_row_once_and_reads_only_what_grew() -> None:
    run, backend = faulty()
    feed = JsonLinesTail(run, layout.METRICS, read_metrics_row)
    assert feed.new() == []
    lines = JsonLinesWriter(run, layout.metrics_part(1), roll_rows=3)
    for step in range(1, 5):
        lines.add({"step": step})
    lines.flush(strict=True)
    assert [row.step for row in feed.new()] == [1, 2, 3, 4]
    lines.add({"step": 5})
    lines.close()
    read: list[str] = []
    backend.before = lambda verb, path: read.append(path) if verb == "read" else None
    assert [row.step for row in feed.new()] == [5]
    assert read == ["faulty://run/metrics/a000001-000001.jsonl"]
    assert feed.new() == []


def test_a_feed_takes_nothing_where_a_read_fails_and_no_half_lines() -> None:
    run, backend = faulty(deadline_s=1.0)
    run.write("metrics/a000001-000000.jsonl", b'{"step": 1}\n{"st')
    feed = JsonLinesTail(run, layout.METRICS, read_metrics_row)
    backend.before = lambda verb, path: unreachable(verb, path) if verb == "read" else None
    with pytest.raises(Exception, match="refused"):
        feed.new()
    backend.before = lambda verb, path: None
    assert [row.step for row in feed.new()] == [1]
    run.write("metrics/a000001-000000.jsonl", b'{"step": 1}\n{"step": 2}\nno json\n{"step": 3}\n')
    assert [row.step for row in feed.new()] == [2, 3]


def test_a_point_holds_the_finite_numbers_of_a_row() -> None:
    row = {"step": 3, "total_steps": 9, "loss": 1.5, "lr": None, "name": "x", "mood": 4, "attempt": 2, "time": 7.0}
    point = point_of(read_metrics_row(row))
    assert point == Point(3, 9, "train", 7.0, {"loss": 1.5, "mood": 4.0, "attempt": 2.0})
    evaluated = point_of(read_metrics_row({"step": 3, "eval_loss": 2.5, "eval_s": 0.5, "attempt": 1}))
    assert evaluated is not None
    assert evaluated.named() == {"eval/loss": 2.5, "eval/s": 0.5, "eval/attempt": 1.0}
    assert point_of(read_metrics_row({"step": 3, "rank": 1})) is None


@pytest.mark.parametrize("exact", [False, True])
def test_a_resumed_run_goes_on_with_the_same_curve_without_doubled_steps(
    server: Server, tmp_path: Any, exact: bool
) -> None:
    server.exact = exact
    run, _ = faulty()
    recipe = recipe_of(tmp_path)
    write_steps(run, 1, 1, 2, 3, 4, evaluated=[4])
    mirror(run, recipe).pump()
    write_steps(run, 2, 3, 4, 5, 6, loss=2.0, evaluated=[4, 6])
    again = mirror(run, recipe)
    again.pump()
    write_steps(run, 3, 6, 7)
    again.pump()
    assert server.steps() == [
        (1, "train"), (2, "train"), (3, "train"), (4, "train"), (4, "eval"),
        (5, "train"), (6, "train"), (6, "eval"), (7, "train"),
    ]  # fmt: skip
    assert [curve.fresh for curve in server.opened] == [True, False]


def test_a_driver_killed_while_it_sends_doubles_nothing(server: Server, tmp_path: Any) -> None:
    run, _ = faulty()
    recipe = recipe_of(tmp_path)
    write_steps(run, 1, 1, 2)
    first = mirror(run, recipe)
    first.pump()
    write_steps(run, 1, 3, 4)
    tracker: Any = first._tracker
    told = tracker.write

    def sent_and_died(points: Sequence[Point]) -> None:
        told(points)
        raise Died

    tracker.write = sent_and_died
    with pytest.raises(Died):
        first.pump()
    write_steps(run, 2, 3, 4, 5)
    mirror(run, recipe).pump()
    assert [step for step, _ in server.steps()] == [1, 2, 3, 4, 5]


def test_a_mended_recipe_begins_a_new_curve(server: Server, tmp_path: Any) -> None:
    run, _ = faulty()
    write_steps(run, 1, 1, 2)
    mirror(run, recipe_of(tmp_path)).pump()
    write_steps(run, 2, 1)
    mirror(run, recipe_of(tmp_path, **{"optimizer.lr": 1e-4})).pump()
    assert [curve.fresh for curve in server.opened] == [True, True]
    assert len(server.curves) == 2


def test_resources_may_change_within_a_curve(server: Server, tmp_path: Any) -> None:
    run, _ = faulty()
    write_steps(run, 1, 1)
    mirror(run, recipe_of(tmp_path)).pump()
    mirror(run, recipe_of(tmp_path, **{"resources": {"workers": 3}, "strategy.kind": "fsdp"})).pump()
    assert len(server.curves) == 1


@pytest.mark.parametrize("error", [ImportError("no module"), ConnectionError("refused"), OSError(28, "disk full")])
def test_a_tracker_that_fails_is_said_once_and_tried_again(
    server: Server, tmp_path: Any, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    run, _ = faulty()
    followed = mirror(run, recipe_of(tmp_path))
    write_steps(run, 1, 1, 2)
    followed._try()
    write_steps(run, 1, 3)
    server.fails = [error] * 4
    pauses = []
    for _ in range(4):
        followed._try()
        pauses.append(followed._pause_s())
    assert pauses == [10.0, 20.0, 40.0, 80.0]
    write_steps(run, 1, 4)
    followed._try()
    assert [step for step, _ in server.steps()] == [1, 2, 3, 4]
    said = [r.getMessage() for r in caplog.records]
    assert [text for text in said if "fails, and training continues" in text] == [said[0]]
    assert said[-1] == "the tracker tensorboard works again, and has received the points that it missed"
    followed._failures = 30
    assert followed._pause_s() == 300.0


def test_a_new_curve_is_new_until_it_has_been_opened(server: Server, tmp_path: Any) -> None:
    run, _ = faulty()
    write_steps(run, 1, 1)
    server.fails = [ConnectionError("refused")] * 2
    for _ in range(2):
        mirror(run, recipe_of(tmp_path))._try()
    mirror(run, recipe_of(tmp_path)).pump()
    mirror(run, recipe_of(tmp_path)).pump()
    assert [curve.fresh for curve in server.opened] == [True, False], "what an older curve has left may still be there"
    assert len(server.curves) == 1


def test_the_end_is_sent_and_waits_for_nobody_longer_than_told(
    server: Server, tmp_path: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = faulty()
    recipe = recipe_of(tmp_path)
    with tracked(recipe, run):
        write_steps(run, 1, 1, 2)
    assert [step for step, _ in server.steps()] == [1, 2]

    def interrupted() -> None:
        with tracked(recipe, run):
            write_steps(run, 1, 3)
            raise Interrupted("a signal")

    with pytest.raises(Interrupted):
        interrupted()
    assert server.states == ["succeeded", "interrupted"]

    held = threading.Event()
    monkeypatch.setattr("trainer.tracking.mirror.PATIENCE_S", 0.2)
    monkeypatch.setattr(FakeTracker, "write", lambda self, points: held.wait(30))
    with tracked(recipe, run):
        write_steps(run, 1, 4)
    held.set()
    assert "has not taken the last steps within" in caplog.text
