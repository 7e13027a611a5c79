"""Figures as plotly's JSON, each with a table of the same data. page.js adds the colours of the light or dark mode."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from launcher.monitor.compare import cell

Trace = dict[str, Any]

COLOURS = ("#4f7df3", "#f59e0b", "#10b981", "#e5484d", "#8b5cf6", "#06b6d4", "#ec4899", "#84cc16")
MOST_POINTS = 2000
MOST_ROWS = 100


@dataclass(frozen=True)
class Table:
    """A table of texts. ``thinned``: the number of rows before some were left out; None if none were. ``numbers``: the
    columns that hold numbers only. ``prose``: its columns are texts to be compared, one below the other on a phone.
    ``colours``: of the curves, by the names of the runs, which get a mark of that colour."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    thinned: int | None = None
    numbers: frozenset[int] = frozenset()
    prose: bool = False
    colours: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Chart:
    """A figure. ``key`` is unique on the page; ``told`` describes the figure for screen readers. ``legend``: colour and
    text of each entry of a legend above the figure, which takes the width that there is, unlike plotly's own."""

    key: str
    told: str
    traces: Sequence[Trace]
    layout: dict[str, Any]
    table: Table
    legend: Sequence[tuple[str, str]] = ()


def table(
    columns: Sequence[str], rows: Iterable[Sequence[Any]], most: int | None = MOST_ROWS, *, prose: bool = False
) -> Table:
    """Makes a table. Of more than ``most`` rows, it keeps that many, evenly spread; None keeps all."""
    every = list(rows)
    shown = every if most is None else thin(every, most)
    texts = [[cell(value) for value in row] for row in shown]
    numbers = {
        at for at in range(len(columns)) if every and all(isinstance(row[at], int | float | None) for row in every)
    }
    return Table(columns, texts, len(every) if len(shown) < len(every) else None, frozenset(numbers), prose)


def without_runs(one: Table) -> Table:
    """Leaves out the first column if it has the names of runs."""
    if one.columns[0] != "run":
        return one
    numbers = frozenset(at - 1 for at in one.numbers)
    return replace(one, columns=one.columns[1:], rows=[row[1:] for row in one.rows], numbers=numbers)


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


def path_end(path: Any) -> str:
    """Returns what says most of a path: the name of a model or of a file; with the folder of a pattern."""
    parts = str(path).rstrip("/").split("/")
    return "/".join(parts[-2:]) if "*" in parts[-1] else parts[-1]


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


def named_once(traces: Sequence[Trace]) -> list[Trace]:
    """Gives all traces of one name one entry in the legend; a click on it hides and shows them together."""
    seen: set[str] = set()
    found = []
    for trace in traces:
        shows = trace.get("showlegend", trace["name"] not in seen)
        found.append({**trace, "legendgroup": trace["name"], "showlegend": shows})
        seen |= {trace["name"]} if shows else set()
    return found


def axes(x: str, y: str, **more: Any) -> dict[str, Any]:
    return {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}, **more}


def constant_axis(values: Iterable[float]) -> dict[str, Any]:
    """Returns an axis from 0 with a tick at values that are all the same; nothing for others, which plotly's own axis
    fits. Its range around one value reaches one up and one down, in which a rate of 1e-3 would look like 0."""
    low, high = min(values := list(values)), max(values)
    if high - low > 1e-6 * max(abs(low), abs(high)) or high == 0:
        return {}
    return {"range": sorted([0.0, 2 * high]), "tickvals": [0.0, high], "tickformat": ".4~g"}
