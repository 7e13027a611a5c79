"""A run whose stored rows and records are of any shape is still shown, and nothing of it ends in a traceback."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from launcher.driver.attempts import explained
from launcher.driver.resize import newest_group
from launcher.monitor.status import list_runs, read_status
from launcher.monitor.tables import checkpoint_lines, runs_table
from launcher.monitor.watch import Watch
from launcher.quickstart.__main__ import show_curve
from launcher.report import report
from launcher.report.reading import read_run
from tests.storage.doubles import faulty
from tests.support.hostile import BYTES, JSON_BOMBS, VALUES, as_json, changed
from tests.support.made_up_run import make_up
from tests.unit.trainer.test_records import LEASE
from trainer.plan.run_length import _speed
from trainer.progress.view import View
from trainer.run import layout
from trainer.run.claims import claim_attempt, claim_driver
from trainer.run.events import BrokenEvent, HangEvent
from trainer.run.failure import Failure
from trainer.run.jsonl import newest_event, newest_failure, read_metrics, read_rows
from trainer.storage import Storage
from trainer.tracking.base import point_of

EVENTS: list[dict[str, Any]] = [
    {"event": "start", "step": 0, "hosts": ["a", "b"], "devices": ["x", "x"], "world_size": 2,
     "strategy": {"kind": "ddp"},
     "versions": {"torch": "2.13.0"}, "build_s": 1.0, "restore_s": 0.5, "total_steps": 9, "driver": 1},
    {"event": "startup", "step": 1, "seconds": {"import": 2.0, "first_step": 3.0}, "total_s": 5.0},
    {"event": "checkpoint", "step": 3, "stall_s": 0.1, "snapshot_s": 0.1, "upload_s": 0.2, "bytes": 9, "coalesced": 0},
    {"event": "skipped_checkpoint", "step": 3, "uri": "u", "reason": "torn"},
    {"event": "stale_checkpoint", "step": 4, "backlog": 1, "age_s": 61.0},
    {"event": "hang", "cause": "held up", "ranks": [{"rank": 1, "host": "b", "step": 4, "phase": "forward"}]},
    {"event": "broken", "seen": {"1": "step 4, forward"}},
    {"event": "texts", "step": 4, "when": "before", "seconds": 0.5,
     "texts": [{"prompt": "p", "text": "t", "reward": 1.0}]},
    {"event": "failure", "cause": "died", "rank": 1, "host": "b", "trace": "t", "advice": "a",
     "retried": True, "driver": 1},
    {"event": "resize", "reason": "c has joined", "driver": 1},
    {"event": "end", "state": "failed", "cause": "died", "step": 4, "driver": 1},
]  # fmt: skip
METRICS = {
    "step": 4, "loss": 2.5, "lr": 1e-4, "step_s": 0.5, "tokens_per_s": 10.0, "total_steps": 9, "world_size": 2,
    "samples": 8, "epoch": 0, "memory_bytes": 2**30, "memory_rank": 1, "slowest_rank": 1, "rank_s": [0.4, 0.5],
    "stall_s": 0.1, "grad_norm": 1.0, "mfu": 0.4,
}  # fmt: skip
EVALUATION = {"step": 4, "eval_loss": 2.0, "eval_s": 0.5, "world_size": 2}


@pytest.fixture(autouse=True, scope="module")
def no_glance() -> Iterator[None]:
    """A lease whose time is in doubt is not watched for a renewal: there is none."""
    with mock.patch("trainer.run.lease.GLANCE_S", 0.0), mock.patch("launcher.monitor.status.GLANCE_S", 0.0):
        yield


def head(row: dict[str, Any], number: int) -> dict[str, Any]:
    return {"attempt": 1, "time": 1.7e9 + number, "writer": "rank0", **row}


ROWS = {
    layout.EVENTS: [head(event, i) for i, event in enumerate(EVENTS)],
    layout.METRICS: [head(METRICS, 20), head(EVALUATION, 21)],
}


def run_with(folder: str, rows: list[Any]) -> Storage:
    """A run with those rows, and with the others sound."""
    run, _ = faulty()
    run.write(layout.RECIPE, b"name: r\n")
    run.write_json(layout.LEASE, LEASE)
    driver = claim_driver(run, {})
    claim_attempt(run, driver, {})
    for name, sound in ROWS.items():
        own = rows if name == folder else sound
        writer = "driver1" if name == layout.EVENTS else "rank0"
        run.write(f"{name}/a000001-{writer}-000000.jsonl", b"\n".join(map(as_json, own)) + b"\n")
    return run


def look_at(run: Storage) -> None:
    """By every reader of rows."""
    console = Console(file=None, force_terminal=False, quiet=True, width=80)
    status = read_status(run)
    json.dumps(status.to_json(), allow_nan=False)
    for table in (*checkpoint_lines(status), runs_table([status], 1.8e9)):
        console.print(table)
    console.print(Watch(run, now=lambda: 1.8e9).render(80))
    for elsewhere in (False, True):
        View(run, 0, 9, clock=lambda: 0.0, driver=1, elsewhere=elsewhere).look(last=True)
    report([read_run(run)])
    newest_group(run, 0)
    newest_failure(run, 1)
    explained(Failure("killed", died=True), [run], 4, 0.0)
    show_curve(console, run)
    for metrics in read_metrics(run):
        point_of(metrics)
    newest_event(run, 1, HangEvent)
    newest_event(run, 1, BrokenEvent)


@pytest.mark.parametrize("folder", ROWS)
@given(data=st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
def test_a_row_of_any_shape_is_shown_or_left_out(folder: str, data: st.DataObject) -> None:
    logging.disable(logging.WARNING)
    try:
        rows = list(ROWS[folder])
        at = data.draw(st.integers(0, len(rows) - 1))
        rows[at] = data.draw(changed(rows[at]) | VALUES)
        look_at(run_with(folder, rows))
    finally:
        logging.disable(logging.NOTSET)


@pytest.mark.parametrize("line", [*JSON_BOMBS.values(), *BYTES.values()], ids=[*JSON_BOMBS, *BYTES])
def test_a_line_that_is_no_row_is_left_out_and_named(line: str | bytes, caplog: pytest.LogCaptureFixture) -> None:
    run = run_with(layout.METRICS, [])
    raw = line if isinstance(line, bytes) else line.encode()
    run.write(f"{layout.METRICS}/a000001-rank0-000000.jsonl", as_json(head(METRICS, 1)) + b"\n" + raw + b"\n")
    assert [row["step"] for row in read_rows(run, layout.METRICS)] == [4]
    look_at(run)
    assert not raw.strip() or "a line that is no row, which is left out" in caplog.text


@pytest.mark.parametrize("key", [layout.LEASE, layout.SUBMISSION, layout.PROVENANCE, layout.DATA, layout.RECIPE])
@pytest.mark.parametrize("body", [*JSON_BOMBS.values(), *BYTES.values()], ids=[*JSON_BOMBS, *BYTES])
def test_an_object_of_a_run_that_is_none_keeps_nothing_else_from_being_shown(key: str, body: str | bytes) -> None:
    run = run_with("", [])
    run.write(key, body if isinstance(body, bytes) else body.encode())
    look_at(run)


def test_a_sound_run_is_shown_whole() -> None:
    """What the others are compared with: no row of these is left out."""
    run = run_with("", [])
    look_at(run)
    assert len(read_rows(run, layout.EVENTS)) == len(EVENTS)
    assert read_status(run).metrics["eval_loss"] == 2.0


def test_runs_that_are_none_are_listed_beside_those_that_are() -> None:
    storage, _ = faulty()
    make_up(storage.child("sound"))
    storage.child("odd").write(layout.RECIPE, b"\xff")
    storage.child("odd").write(layout.LEASE, b"[" * 100_000)
    assert [status.name for status in list_runs(storage)] == ["odd", "sound"]


def test_the_pace_of_a_run_is_told_by_rows_that_have_one(tmp_path: Any) -> None:
    from types import SimpleNamespace

    rows = [{**METRICS, "tokens_per_s": None}, {**METRICS, "world_size": None}, METRICS]
    (tmp_path / "r" / layout.METRICS).mkdir(parents=True)
    part = tmp_path / "r" / layout.METRICS / "a000001-rank0-000000.jsonl"
    part.write_bytes(b"\n".join(map(as_json, rows)) + b"\n")
    recipe: Any = SimpleNamespace(storage=str(tmp_path), name="r")
    assert _speed(recipe) == (10.0, 2)


def test_a_run_of_an_older_version_is_shown() -> None:
    """Without what was added since: times in rows, a failure's advice, how often workers were gathered."""
    older = ("time", "versions", "devices", "driver", "build_s", "restore_s", "retried", "rank_s", "memory_rank")
    run = run_with("", [])
    run.write_json(layout.LEASE, {name: value for name, value in LEASE.items() if name != "gathers"})
    for folder, rows in ROWS.items():
        writer = "driver1" if folder == layout.EVENTS else "rank0"
        lines = [as_json({name: value for name, value in row.items() if name not in older}) for row in rows]
        run.write(f"{folder}/a000001-{writer}-000000.jsonl", b"\n".join(lines) + b"\n")
    look_at(run)
    assert len(read_rows(run, layout.EVENTS)) == len(EVENTS)
    assert read_status(run).step == 4


def test_a_run_of_a_newer_version_is_shown_and_its_recipe_names_the_version() -> None:
    from trainer.errors import RecipeError
    from trainer.run.frozen import read_recipe

    run = run_with("", [])
    run.write_json(layout.LEASE, {**LEASE, "zone": "b"})
    run.write(f"{layout.METRICS}/a000001-rank0-000000.jsonl", as_json({**head(METRICS, 1), "mood": {"a": [1]}}) + b"\n")
    run.write(f"{layout.EVENTS}/a000001-rank0-000000.jsonl", as_json({"event": "moved", "to": [1]}) + b"\n")
    look_at(run)
    assert read_status(run).step == 4
    assert read_rows(run, layout.METRICS)[0]["mood"] == {"a": [1]}
    run.write(layout.RECIPE, b"name: r\nmood: calm\n")
    run.write_json(layout.PROVENANCE, {"muster": "7.0.0+abc"})
    with pytest.raises(
        RecipeError, match=r"started with muster 7\.0\.0\+abc, and this is .*; continue with that version"
    ):
        read_recipe(run)


def test_a_number_whose_range_overflows_is_shown() -> None:
    rows = list(ROWS["metrics"])
    rows[0] = {**rows[0], "writer": 8.98846567431158e307}
    look_at(run_with("metrics", rows))
