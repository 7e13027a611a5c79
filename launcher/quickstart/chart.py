"""Draws a loss curve as lines of text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

Point = tuple[int, float]
MIN_WIDTH = 20
"""Columns that the axis labels need."""


def losses(rows: Iterable[tuple[int, int, float | None]]) -> list[Point]:
    """Returns (step, loss) by step of rows (attempt, step, loss) that have a loss; the newest attempt's if a step was
    trained twice."""
    best: dict[int, tuple[int, float]] = {}
    for attempt, step, loss in rows:
        if loss is not None and attempt >= best.get(step, (0, 0.0))[0]:
            best[step] = attempt, loss
    return [(step, value) for step, (_, value) in sorted(best.items())]


def draw(curve: Sequence[Point], width: int = 60, height: int = 12, mark: str = "*") -> list[str]:
    """Returns ``height`` lines of a plot, at most ``width`` columns wide, then its axis and the first and last step.

    A short run has one column per step. For a long run, a column shows the mean over its steps, which keeps the shape.
    Returns an empty list if the curve has no finite value.
    """
    curve = [(step, value) for step, value in curve if math.isfinite(value)]
    if not curve:
        return []
    width = min(width, max(len(curve), MIN_WIDTH))
    columns = _columns(curve, width)
    low, high = min(columns.values()), max(columns.values())
    span = (high - low) or 1.0
    canvas = [[" "] * width for _ in range(height)]
    for column, value in columns.items():
        canvas[round((high - value) / span * (height - 1))][column] = mark
    labels = {0: f"{high:.2f}", height - 1: f"{low:.2f}"} if high > low else {0: f"{high:.2f}"}
    body = [f"{labels.get(i, ''):>8} |{''.join(line).rstrip()}" for i, line in enumerate(canvas)]
    first, last = f"step {curve[0][0]}", str(curve[-1][0])
    return [*body, f"{'':>8} +{'-' * width}", f"{'':>9} {first}{last:>{max(width - len(first), len(last) + 1)}}"]


def _columns(curve: Sequence[Point], width: int) -> dict[int, float]:
    """Returns column -> mean of the values whose steps fall into the column."""
    first, last = curve[0][0], curve[-1][0]
    sums: dict[int, tuple[float, int]] = {}
    for step, value in curve:
        column = round((step - first) / max(last - first, 1) * (width - 1))
        total, count = sums.get(column, (0.0, 0))
        sums[column] = (total + value, count + 1)
    return {column: total / count for column, (total, count) in sums.items()}
