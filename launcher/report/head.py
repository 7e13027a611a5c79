"""The head of a report: the state and the main figures of one run, or a table of several and of what differs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from launcher.monitor.compare import differing
from launcher.report.chart import Table, colour, path_end, table
from launcher.report.reading import RunRecord
from trainer.progress.texts import duration, plural
from trainer.run.events import StartEvent

MOST_COLUMNS = 6
"""Of more settings that differ, each is a row of the table, and each run a column."""


@dataclass(frozen=True)
class Figure:
    """A large figure: ``value`` with a ``detail`` below it."""

    label: str
    value: str
    detail: str


@dataclass(frozen=True)
class Head:
    """``state``: of one run. ``compared``: of several runs. ``failure``: cause and advice of a run that has stopped."""

    title: str
    state: str = ""
    note: str = ""
    figures: Sequence[Figure] = ()
    failure: str = ""
    compared: Table | None = None


def head_of(runs: Sequence[RunRecord]) -> Head:
    if len(runs) > 1:
        keys = differing([run.settings for run in runs])
        order = (
            "the lowest evaluation loss" if all("eval_loss" in r.status.metrics for r in runs) else "the lowest loss"
        )
        note = f"The run with {order} comes first. " + (
            f"The recipes differ in {plural(len(keys), 'setting')}." if keys else "The recipes are the same."
        )
        return Head(f"{len(runs)} runs", note=note, compared=comparison(runs, keys))
    (run,) = runs
    status = run.status
    failure = (status.failure or {}) if status.state != "running" else {}
    steps = f"step {status.step:,} of {status.total_steps:,}" if status.total_steps else "no step yet"
    steps += ", where it ended early" if status.early_stop else ""
    attempts = max(status.attempts, *run.starts, 0)
    parts = [steps, plural(attempts, "attempt") if attempts else "", status.uri]
    told = "\n\n".join(str(failure[name]) for name in ("cause", "advice") if failure.get(name))
    drawn = (_model(run), _method(run), _data(run), _hardware(run), _duration(run), _loss(run), _best(run))
    return Head(run.label, status.state, " · ".join(filter(None, parts)), [figure for figure in drawn if figure], told)


def comparison(runs: Sequence[RunRecord], keys: Sequence[str]) -> Table:
    """Returns a row per run with the settings and the results; of many settings a column per run, the results first."""
    many = len(keys) > MOST_COLUMNS
    results = ["eval loss", "loss", "state", "step", "wall time", "goodput"]
    columns = ["run", *results, *keys] if many else ["run", *keys, *results]
    rows = []
    for run in runs:
        status, settings = run.status, [run.settings.get(key) for key in keys]
        values = [status.metrics.get(name) for name in ("eval_loss", "loss")]
        losses = [f"{value:.4f}" if isinstance(value, int | float) else None for value in values]
        spent = [f"{status.step:,} of {status.total_steps:,}", duration(run.went.wall_s), f"{run.went.share:.0%}"]
        reached = [*losses, status.state, *spent]
        rows.append([run.label, *reached, *settings] if many else [run.label, *settings, *reached])
    if many:
        columns, *rows = map(list, zip(columns, *rows, strict=True))
    colours = {run.label: colour(index) for index, run in enumerate(runs)}
    return replace(table(columns, rows, most=None), colours=colours)


def _model(run: RunRecord) -> Figure | None:
    path = run.settings.get("model.path")
    if not path:
        return None
    held = [run.settings.get(f"model.{name}") for name in ("quantization", "dtype")]
    return Figure("model", path_end(path), " · ".join(str(name) for name in held if name not in (None, "none")))


def _method(run: RunRecord) -> Figure | None:
    settings = run.settings
    method = settings.get("adapter.method") or settings.get("adapter.method.peft")
    if not method:
        return None
    rank, task = settings.get("adapter.rank"), settings.get("task")
    shares = [start.adapted_share for start in run.told(StartEvent) if start.adapted_share]
    name = "full" if method == "none" else f"{method}, rank {rank}" if rank else str(method)
    adapted = f"{shares[-1]:.0%} of the weights adapted" if shares and method != "none" else ""
    return Figure("method", name, " · ".join(filter(None, (str(task or ""), adapted))))


def _data(run: RunRecord) -> Figure | None:
    paths = [value for key, value in run.settings.items() if key.startswith("data.train.") and key.endswith(".path")]
    if not paths:
        return None
    counts = [counts for part, _, counts in run.data.parts if part == "train"]
    samples, tokens = sum(c.samples for c in counts), sum(c.tokens for c in counts)
    detail = [f"and {len(paths) - 1} more" if len(paths) > 1 else ""]
    detail += [f"{_short(samples)} samples", f"{_short(tokens)} tokens"] if counts else []
    return Figure("data", path_end(paths[0]), " · ".join(filter(None, detail)))


def _hardware(run: RunRecord) -> Figure | None:
    starts = run.told(StartEvent)
    if not starts:
        return None
    devices = Counter(name.removeprefix("NVIDIA ") for name in starts[-1].devices)
    kinds = ", ".join(
        f"{count} \N{MULTIPLICATION SIGN} {'CPU' if name == 'cpu' else name}" for name, count in devices.items()
    )
    hosts, kind = len(set(starts[-1].hosts)), starts[-1].strategy.get("kind")
    detail = " · ".join(filter(None, (plural(hosts, "host") if hosts else "", str(kind or ""))))
    return Figure("hardware", kinds or plural(run.status.world_size, "worker"), detail)


def _best(run: RunRecord) -> Figure | None:
    best = run.status.best
    if best is None:
        return None
    return Figure("best evaluation", f"{best['value']:.4f}", f"{best['metric']} after step {best['step']:,}")


def _duration(run: RunRecord) -> Figure | None:
    if run.went.wall_s <= 0:
        return None
    tokens = [row.tokens for row in run.trained if row.tokens is not None]
    detail = [f"{run.went.share:.0%} goodput", f"{_short(sum(tokens))} tokens" if tokens else ""]
    return Figure("duration", duration(run.went.wall_s), " · ".join(filter(None, detail)))


def _loss(run: RunRecord) -> Figure | None:
    losses = [row.loss for row in run.steps if row.loss is not None]
    evals = [row.eval_loss for row in run.evaluations if row.eval_loss is not None]
    if not losses:
        return None
    return Figure("loss", _course(losses), f"eval {_course(evals)}" if evals else "")


def _course(values: Sequence[float]) -> str:
    ends = dict.fromkeys((values[0], values[-1]))
    return " → ".join(f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.2g}" for value in ends)


def _short(count: int) -> str:
    """Returns a count with three digits: ``8.43M``."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)
