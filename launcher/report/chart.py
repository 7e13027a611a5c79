"""Figures as plotly's JSON, each with a table of the same data. page.js adds the colours of the light or dark mode."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Trace = dict[str, Any]

COLOURS = ("#3b82f6", "#f59e0b", "#10b981", "#ef4444", "#8b5cf6", "#06b6d4", "#ec4899", "#84cc16")
MOST_POINTS = 2000
MOST_ROWS = 100


@dataclass(frozen=True)
class Table:
    """A table of texts. ``thinned``: the number of rows before some were left out; None if none were."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    thinned: int | None = None


@dataclass(frozen=True)
class Chart:
    """A figure. ``key`` is unique on the page; ``told`` describes the figure for screen readers."""

    key: str
    told: str
    traces: Sequence[Trace]
    layout: dict[str, Any]
    table: Table


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], most: int | None = MOST_ROWS) -> Table:
    """Makes a table. Of more than ``most`` rows, it keeps that many, evenly spread; None keeps all."""
    every = list(rows)
    shown = every if most is None else thin(every, most)
    texts = [[cell(value) for value in row] for row in shown]
    return Table(columns, texts, len(every) if len(shown) < len(every) else None)


def cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def thin(items: Sequence[Any], most: int) -> list[Any]:
    """Returns at most ``most`` items, evenly spread, including the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def thin_curve(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """Keeps the lowest and the highest point of each stretch, so that no spike is lost."""
    if len(points) <= most:
        return list(points)
    stretch = -(-len(points) // (most // 2))
    found: list[tuple[float, float]] = []
    for at in range(0, len(points), stretch):
        part = points[at : at + stretch]
        found += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return found


def safe(text: str) -> str:
    """Escapes a name in a figure, because plotly interprets some HTML."""
    return html.escape(text, quote=False)


def colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def curve(name: str, points: Sequence[tuple[float, float]], shade: str, **more: Any) -> Trace:
    shown = thin_curve(points)
    lone = len(shown) == 1
    return {
        "type": "scatter",
        "mode": "markers" if lone else "lines",
        "name": safe(name),
        "x": [x for x, _ in shown],
        "y": [y for _, y in shown],
        "line": {"color": shade, "width": 2},
        **more,
    }


def axes(x: str, y: str, **more: Any) -> dict[str, Any]:
    return {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}, **more}
