"""The results of a sweep's trials, read from the storage: one row per trial, the best first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from launcher.monitor.compare import cell, short_name
from launcher.monitor.goodput import WAITING, goodput, newest_driver
from launcher.monitor.status import read_state
from launcher.monitor.tables import STATE_STYLES
from trainer.progress.texts import plural
from trainer.recipe import Recipe
from trainer.recipe.sweeps.trials import direction
from trainer.run.best import value_of
from trainer.run.events import Event, StartEvent
from trainer.run.jsonl import read_events, read_metrics
from trainer.run.metrics import EvalMetrics, StepMetrics
from trainer.run.sweep import COMPLETE, ENDED, FAILED, RUNNING, STOPPED, STOPPING, TrialRecord, read_trials
from trainer.storage import Storage, in_parallel

PARALLEL_RUNS = 16
MOST_WIDTH = 1000
INTERRUPTED = "interrupted"
STYLES = {**STATE_STYLES, COMPLETE: "green", STOPPED: "", FAILED: "red"}


@dataclass(frozen=True)
class TrialRow:
    """A trial. ``value``: the metric of its adapter, which decides the order: the ``last`` one, or the ``best`` one
    with `checkpoint.keep_best`. ``worker_hours``: of all workers in all attempts; ``gpu_hours`` of their GPUs."""

    number: int
    run: str
    uri: str
    values: Mapping[str, Any]
    state: str
    step: int
    value: float | None
    best: float | None
    best_step: int | None
    last: float | None
    worker_hours: float
    gpu_hours: float
    cause: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read_rows(recipe: Recipe, sweep: Storage, storage: Storage) -> list[TrialRow]:
    """Reads the trials of a sweep, and returns them in order: by the metric, then those without one."""
    trials = read_trials(sweep)
    rows = in_parallel(lambda trial: _row(recipe, trial, storage.child(trial.run)), trials, PARALLEL_RUNS)
    return ordered(rows, lowest_first=direction(recipe) == "min")


def ordered(rows: Sequence[TrialRow], *, lowest_first: bool) -> list[TrialRow]:
    """Returns the rows, the best first; of equal ones the earlier trial. A failed trial counts as if it had no
    value."""
    known = [row for row in rows if row.value is not None and row.state != FAILED]
    known.sort(key=lambda row: (row.value or 0.0) * (1 if lowest_first else -1))
    return [*known, *(row for row in rows if row not in known)]


def best_of(rows: Sequence[TrialRow]) -> TrialRow | None:
    """Returns the first row if it has a value."""
    return rows[0] if rows and rows[0].value is not None and rows[0].state != FAILED else None


def _row(recipe: Recipe, trial: TrialRecord, run: Storage) -> TrialRow:
    assert recipe.sweep is not None
    metric, better = recipe.sweep.metric, direction(recipe)
    metrics, events = read_metrics(run), read_events(run)
    evaluations = {row.step: value_of(row, metric) for row in metrics if isinstance(row, EvalMetrics)}
    values = {step: value for step, value in sorted(evaluations.items()) if value is not None}
    best_step = (min if better == "min" else max)(values, key=lambda step: values[step], default=None)
    best, last = values.get(best_step or 0), next(reversed(values.values()), None)
    hours = worker_hours(metrics, events, newest_driver(run))
    return TrialRow(
        number=trial.number,
        run=trial.run,
        uri=run.url,
        values=trial.values,
        state=_state(trial, run),
        step=max((row.step for row in metrics if isinstance(row, StepMetrics)), default=0),
        value=best if recipe.checkpoint.keep_best == metric else last,
        best=best,
        best_step=best_step,
        last=last,
        worker_hours=hours,
        gpu_hours=hours * recipe.resources.gpus_per_worker,
        cause=trial.cause,
    )


def _state(trial: TrialRecord, run: Storage) -> str:
    if trial.state in ENDED:
        return trial.state
    held = read_state(run) == RUNNING
    return RUNNING if held else STOPPED if trial.state == STOPPING else INTERRUPTED


def worker_hours(metrics: Sequence[Any], events: Sequence[Event], driver: int | None) -> float:
    """Returns the hours of all workers, from their start to their end."""
    workers = {event.attempt: len(event.hosts) for event in events if isinstance(event, StartEvent)}
    pieces = goodput(events, metrics, driver=driver).pieces
    seconds = sum(
        (piece.end - piece.begin) * workers.get(piece.attempt, 1) for piece in pieces if piece.kind != WAITING
    )
    return seconds / 3600


def table(rows: Sequence[TrialRow], metric: str, price_per_gpu_hour: float | None = None) -> Table:
    """Returns a table for a terminal; its hours are those of all workers. ``price_per_gpu_hour`` adds what each trial
    has cost."""
    keys = list(dict.fromkeys(key for row in rows for key in row.values))
    settings = [row.values for row in rows]
    titles = ["run", *(short_name(key, settings) for key in keys), metric, "best", "steps", "state", "hours"]
    titles += [] if price_per_gpu_hour is None else ["cost"]
    found = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for title in titles:
        found.add_column(title, no_wrap=title != "run", overflow="fold")
    for row in rows:
        best = "-" if row.best is None else f"{number(row.best)} @{row.best_step}"
        cells = [row.run, *(setting(row.values.get(key)) for key in keys), number(row.value), best, f"{row.step:,}"]
        hours = [f"{row.worker_hours:.2f}"]
        cost = [] if price_per_gpu_hour is None else [f"{row.gpu_hours * price_per_gpu_hour:,.2f}"]
        state = Text(row.state, style=STYLES.get(row.state, ""))
        found.add_row(*map(Text, cells), state, *map(Text, [*hours, *cost]))
    return found


def setting(value: Any) -> str:
    """Returns the value of a setting, a number with four digits."""
    return f"{value:.4g}".replace("e-0", "e-") if isinstance(value, float) else cell(value)


def print_table(console: Console, found: Table) -> None:
    """Prints a table without cutting it; outside of a terminal no line is folded either."""
    natural = Measurement.get(console, console.options.update(max_width=MOST_WIDTH), found).maximum
    console.print(found, width=None if console.is_terminal else max(natural, console.width), crop=False)


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def total(rows: Sequence[TrialRow]) -> str:
    """Returns the counts and the hours of all trials in one line."""
    states = {
        state: sum(row.state == state for row in rows) for state in (COMPLETE, STOPPED, FAILED, RUNNING, INTERRUPTED)
    }
    said = ", ".join(f"{count} {state}" for state, count in states.items() if count)
    return f"{plural(len(rows), 'trial')}: {said}; {sum(row.worker_hours for row in rows):.2f} worker hours"
