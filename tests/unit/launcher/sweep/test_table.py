"""The end of a sweep: the order of the trials, their costs, and the recipe of the best one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from launcher.sweep.best import best_text, write_best
from launcher.sweep.ending import show_end
from launcher.sweep.table import TrialRow, best_of, ordered, read_rows, table, total
from launcher.testing.training import small_recipe
from tests.unit.launcher.sweep.test_trial import eval_row, step_row
from tests.unit.trainer.recipe.sweeps.test_trials import base
from trainer.recipe import Recipe, loads
from trainer.run import layout
from trainer.run.events import EndEvent, StartEvent
from trainer.run.jsonl import JsonLinesWriter
from trainer.run.sweep import TrialRecord, folder_of, write_trial
from trainer.storage import open_storage

ROW = TrialRow(1, "toy-001", "runs/toy-001", {"optimizer.lr": 1e-4}, "complete", 40, 5.0, 5.0, 40, 5.0, 1.5, 3.0)


def row(number: int, value: float | None, **changes: Any) -> TrialRow:
    return replace(ROW, number=number, run=f"toy-{number:03d}", value=value, **changes)


def shown(rows: list[TrialRow], width: int = 200, **settings: Any) -> str:
    console = Console(width=width)
    with console.capture() as captured:
        console.print(table(rows, "eval_loss", **settings))
    return captured.get()


def test_the_best_comes_first_and_a_failure_last() -> None:
    rows = [row(1, 5.0), row(2, None), row(3, 4.0), row(4, 3.0, state="failed"), row(5, 4.0)]
    assert [one.number for one in ordered(rows, lowest_first=True)] == [3, 5, 1, 2, 4]
    assert [one.number for one in ordered(rows, lowest_first=False)] == [1, 3, 5, 2, 4]
    assert best_of(ordered(rows, lowest_first=True)) == rows[2]
    assert best_of([row(2, None)]) is None
    assert best_of([row(4, 3.0, state="failed")]) is None


def test_the_table_shows_what_differs_and_the_cost_with_a_price() -> None:
    rows = [row(1, 5.0), row(2, None, state="failed", best=None, values={"optimizer.lr": 0.009062663325069654})]
    lines = shown(rows).splitlines()
    assert lines[1].split() == ["run", "lr", "eval_loss", "best", "steps", "state", "hours"]
    assert lines[3].split() == ["toy-001", "0.0001", "5.0000", "5.0000", "@40", "40", "complete", "1.50"]
    assert "0.009063" in lines[4]
    assert "7.50" in shown(rows, price_per_gpu_hour=2.5)
    assert total(rows) == "2 trials: 1 complete, 1 failed; 3.00 worker hours"


def recipe_of(folder: Path, **changes: Any) -> Recipe:
    sweep = {"parameters": {"adapter.rank": [2, 4]}}
    evaluations = {"data.eval_fraction": 0.1, "training.eval_every": 10, "sweep": sweep}
    return small_recipe("toy", folder / "model", folder, **evaluations, **changes)


def test_rows_are_read_from_the_runs(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, resources={"workers": 2, "gpus_per_worker": 1})
    storage = open_storage(recipe.storage)
    sweep, run = folder_of(storage, "toy"), storage.child("toy-001")
    write_trial(sweep, TrialRecord(1, "toy-001", {"adapter.rank": 2}, "stopping"))
    write_trial(sweep, TrialRecord(2, "toy-002", {"adapter.rank": 4}))
    metrics, events = (
        JsonLinesWriter(run, prefix) for prefix in (layout.metrics_part(1), layout.events_part(1, "rank0"))
    )
    events.add(StartEvent(attempt=1, time=1000.0, hosts=("a", "b"), pids=(1, 2), step=0).to_row())
    for step, value in ((10, 4.0), (20, 5.0)):
        metrics.add(replace(step_row(step), attempt=1, time=1000.0 + 90 * step).to_row())
        metrics.add(replace(eval_row(step, value), attempt=1, time=1000.0 + 90 * step + 1).to_row())
    events.add(EndEvent(attempt=1, time=1000.0 + 3600, state="interrupted").to_row())
    metrics.close()
    events.close()
    first, second = read_rows(recipe, sweep, storage)
    assert (first.state, first.step, first.value, first.best, first.best_step, first.last) == (
        "stopped",
        20,
        5,
        4,
        10,
        5,
    )
    assert abs(first.worker_hours - 2.0) < 0.01
    assert first.gpu_hours == first.worker_hours
    assert (second.state, second.value, second.worker_hours) == ("interrupted", None, 0)
    best = read_rows(recipe_of(tmp_path, **{"checkpoint.keep_best": "eval_loss"}), sweep, storage)[0]
    assert best.value == 4.0  # that of the adapter


def test_the_best_recipe_is_written_but_not_over_a_file_of_somebody_else(tmp_path: Path) -> None:
    sweep = folder_of(open_storage(str(tmp_path / "runs")), "toy")
    text, file = best_text(base(), "toy", ROW, "eval_loss"), tmp_path / "toy-best.yaml"
    assert write_best(sweep, text, tmp_path, "toy") == str(file)
    found = loads(file.read_text())
    assert (found.name, found.optimizer.lr) == ("toy-best", 1e-4)
    other = best_text(base(), "toy", row(2, 4.0, values={"optimizer.lr": 3e-4}), "eval_loss")
    assert write_best(sweep, other, tmp_path, "toy") == str(file)  # its own one is replaced
    assert file.read_text() == other
    file.write_text("mine")
    assert "is another one, and stays" in write_best(sweep, text, tmp_path, "toy")
    assert file.read_text() == "mine"
    assert sweep.read("best.yaml").decode() == text


def test_the_last_lines_say_what_to_do(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    console = Console(width=80)
    with console.capture() as captured:
        failed = row(2, None, state="failed", cause="loss is nan")
        show_end(recipe_of(tmp_path), base(), [ROW, failed], None, console, None)
    lines = captured.get().splitlines()
    assert "toy-002 failed: loss is nan" in lines
    assert "the best: toy-001, eval_loss 5.0000: optimizer.lr 0.0001" in lines
    assert "its recipe: toy-best.yaml" in lines
    assert f"all curves in one page: muster report {tmp_path}/runs/toy" in lines
