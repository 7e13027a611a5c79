"""Charts of a run's metrics over its steps, with a mark where each attempt resumed."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from statistics import median, quantiles
from typing import Any

from launcher.report.chart import Chart, Trace, axes, colour, constant_axis, curve, named_once, safe, table
from launcher.report.reading import RunRecord
from trainer.run.metrics import Metrics

Value = Callable[[Any], float | None]
"""Returns the value of a row to draw; None: no point."""
MOST_TASK_METRICS = 24
LAST = 2000
"""Plotly's rank of an entry behind those without one in the legend."""
FEW_POINTS = 60
"""A curve of fewer points is drawn without a moving mean."""


def metric_chart(
    key: str,
    told: str,
    y: str,
    runs: Sequence[RunRecord],
    value: Value,
    *,
    evaluation: bool = False,
    smooth: bool = False,
    y_axis: Mapping[str, Any] | None = None,
    legend: bool = False,
) -> Chart | None:
    """Draws a curve per run, and another one for steps that were trained again. Returns None if no run has such values.

    ``y`` names the values. ``smooth``: draws a moving mean over a pale curve of the values."""
    traces: list[Trace] = []
    rows: list[list[Any]] = []
    for index, run in enumerate(runs):
        source: Sequence[Metrics] = run.evaluations if evaluation else run.steps
        kept = _points(source, value)
        if not kept:
            continue
        shade, name = colour(index), run.label if len(runs) > 1 else y
        mean = moving_mean(kept) if smooth else None
        if mean:
            traces.append(curve(name, kept, shade, line={"color": shade, "width": 1}, opacity=0.35, showlegend=False))
        marks = {"mode": "lines+markers"} if evaluation else {}
        traces.append(curve(name, mean or kept, shade, **marks))
        if not evaluation and (lost := _points(run.lost, value)):
            dotted = {"color": shade, "width": 1.5, "dash": "dot"}
            traces.append(curve("trained again", lost, shade, line=dotted, opacity=0.6, legendrank=LAST))
        traces += [] if evaluation else _resumed(run, mean or kept, shade)
        rows += [[run.label, row.attempt, row.step, value(row)] for row in source if value(row) is not None]
    if not traces:
        return None
    names = {trace["name"] for trace in traces}
    layout = axes("step", "", hovermode="x unified", showlegend=legend and len(names) > 1)
    layout["yaxis"] |= {**constant_axis(row[-1] for row in rows), **(y_axis or {})}
    return Chart(key, told, named_once(traces), layout, table(("run", "attempt", "step", y), rows))


def task_metrics(runs: Sequence[RunRecord]) -> list[tuple[str, bool]]:
    """Returns the names of the task's own metrics, and if each is of the evaluations."""
    found = {(name, False): None for run in runs for row in run.steps for name in row.task}
    found |= {(name, True): None for run in runs for row in run.evaluations for name in row.task}
    return list(found)[:MOST_TASK_METRICS]


def task_value(name: str) -> Value:
    def value(row: Any) -> float | None:
        found = row.task.get(name)
        is_number = isinstance(found, int | float) and not isinstance(found, bool) and math.isfinite(found)
        return found if is_number else None

    return value


def _points(rows: Sequence[Metrics], value: Value) -> list[tuple[float, float]]:
    """Returns (step, value) by step. A later attempt's row replaces an earlier row of the same step."""
    found = {row.step: float(drawn) for row in rows if (drawn := value(row)) is not None}
    return sorted(found.items())


def moving_mean(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]] | None:
    """Returns each point's mean over the points around it, a twentieth of all; None for a curve of few points."""
    if len(points) < FEW_POINTS:
        return None
    reach = len(points) // 40
    sums = [0.0, *accumulate(y for _, y in points)]
    found = []
    for at, (x, _) in enumerate(points):
        before = min(reach, at)
        after = min(before, len(points) - 1 - at)  # never more than before: a steep start stays steep
        found.append((x, (sums[at + after + 1] - sums[at - before]) / (before + after + 1)))
    return found


def _resumed(run: RunRecord, drawn: list[tuple[float, float]], shade: str) -> list[Trace]:
    """Marks the step at which each attempt, except the first, resumed."""
    at = {
        attempt: drawn[min(bisect_left(drawn, (step + 1, float("-inf"))), len(drawn) - 1)]
        for attempt, step in list(run.starts.items())[1:]
    }
    if not at:
        return []
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "name": "resumed",
            "legendrank": LAST,
            "x": [x for x, _ in at.values()],
            "y": [y for _, y in at.values()],
            "text": [f"attempt {attempt}" for attempt in at],
            "hovertemplate": "%{text}",
            "cliponaxis": False,
            "marker": {"symbol": "diamond", "size": 9, "color": shade, "line": {"width": 1.5, "color": "#ffffff"}},
        }
    ]


def largest_rank(run: RunRecord) -> str:
    """Returns a sentence about the rank with the most memory, or '' if the metrics do not name ranks."""
    found = [(row.memory_bytes, row) for row in run.trained if row.memory_bytes is not None]
    named = [(count, row) for count, row in found if row.memory_rank is not None]
    if not named:
        return ""
    count, most = max(named, key=lambda one: one[0])
    return f"{run.label}: at most {count / 2**30:.4g} GiB, on rank {most.memory_rank} at step {most.step}."


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
    layout = axes("", "steps", barmode="overlay")
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
