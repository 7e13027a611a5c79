"""Charts of a run's metrics over its steps, with a mark where each attempt resumed."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from statistics import median, quantiles
from typing import Any

from launcher.report.chart import Chart, Trace, axes, colour, curve, safe, table
from launcher.report.reading import RunRecord
from trainer.run.metrics import Metrics

Value = Callable[[Any], float | None]
"""Returns the value of a row to draw; None: no point."""


def metric_chart(
    key: str, told: str, y: str, runs: Sequence[RunRecord], value: Value, *, evaluation: bool = False, **more: Any
) -> Chart | None:
    """Draws a curve per run, and another one for repeated steps. Returns None if no run has such values."""
    traces: list[Trace] = []
    rows: list[list[Any]] = []
    for index, run in enumerate(runs):
        kept = _points(run.evaluations if evaluation else run.steps, value)
        if not kept:
            continue
        shade = colour(index)
        marks = {"mode": "lines+markers"} if evaluation else {}
        traces.append(curve(run.label, kept, shade, **marks))
        if not evaluation and (lost := _points(run.lost, value)):
            dotted = {"color": shade, "width": 1.5, "dash": "dot"}
            traces.append(curve(f"{run.label}: repeated", lost, shade, line=dotted, opacity=0.6))
        traces += _attempts(run, kept, shade)
        source = run.evaluations if evaluation else run.steps
        rows += [[run.label, row.attempt, row.step, value(row)] for row in source if value(row) is not None]
    if not traces:
        return None
    return Chart(key, told, traces, axes("step", y, **more), table(("run", "attempt", "step", y), rows))


def _points(rows: Sequence[Metrics], value: Value) -> list[tuple[float, float]]:
    """Returns (step, value) by step. A later attempt's row replaces an earlier row of the same step."""
    found = {row.step: float(drawn) for row in rows if (drawn := value(row)) is not None}
    return sorted(found.items())


def _attempts(run: RunRecord, kept: list[tuple[float, float]], shade: str) -> list[Trace]:
    """Marks the step at which each attempt, except the first, resumed."""
    xs, ys, texts = [], [], []
    for attempt, step in list(run.starts.items())[1:]:
        at = min(bisect_left(kept, (step + 1, float("-inf"))), len(kept) - 1)
        xs.append(kept[at][0])
        ys.append(kept[at][1])
        texts.append(f"attempt {attempt}")
    if not xs:
        return []
    return [
        {
            "type": "scatter",
            "mode": "markers+text",
            "name": safe(f"{run.label}: resumed"),
            "x": xs,
            "y": ys,
            "text": texts,
            "textposition": "top center",
            "cliponaxis": False,
            "marker": {"symbol": "diamond", "size": 10, "color": shade, "line": {"width": 1, "color": "#ffffff"}},
        }
    ]


def largest_rank(run: RunRecord) -> str:
    """Returns a sentence about the rank with the most memory, or '' if the metrics do not name ranks."""
    found = [(row.memory_bytes, row) for row in run.trained if row.memory_bytes is not None]
    named = [(count, row) for count, row in found if row.memory_rank is not None]
    if not named:
        return ""
    count, most = max(named, key=lambda one: one[0])
    held = f"{count / 2**30:.4g} GiB, on rank {most.memory_rank} at step {most.step}"
    return f"{run.label}: the memory of the rank that uses most; the maximum was {held}."


def step_time_chart(runs: Sequence[RunRecord]) -> Chart | None:
    """Draws a histogram of the seconds per step."""
    traces, rows = [], []
    for index, run in enumerate(runs):
        times = [row.step_s for row in run.trained if row.step_s is not None]
        if not times:
            continue
        low, high, counts = histogram(times)
        width = (high - low) / len(counts)
        middles = [low + width * (i + 0.5) for i in range(len(counts))]
        bars = {"type": "bar", "name": safe(run.label), "x": middles, "y": counts, "width": width, "opacity": 0.75}
        traces.append({**bars, "marker": {"color": colour(index)}})
        cuts = quantiles(times, n=100, method="inclusive") if len(times) > 1 else times * 99
        rows.append([run.label, len(times), min(times), cuts[4], median(times), cuts[94], cuts[98], max(times)])
    if not traces:
        return None
    columns = ("run", "steps", "fastest s", "5 %", "median", "95 %", "99 %", "slowest s")
    layout = axes("seconds per step", "steps", barmode="overlay")
    return Chart("step-times", "histogram of the seconds per step", traces, layout, table(columns, rows))


def histogram(values: Sequence[float], bins: int = 40) -> tuple[float, float, list[int]]:
    """Returns (lowest edge, highest edge, count of each bin)."""
    low, high = min(values), max(values)
    if high <= low:
        high = low + max(abs(low) * 0.01, 1e-6)
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, int((value - low) / (high - low) * bins))] += 1
    return low, high, counts
