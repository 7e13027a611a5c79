"""Builds one HTML page from a head and groups of cards. It contains everything, also plotly's script; all texts are
escaped."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from launcher.report.chart import Chart, Table
from launcher.report.head import Head
from trainer.errors import UsageError

HERE = Path(__file__).parent

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
"""With this policy, a browser fetches nothing for the page, whatever the page contains."""

LONGEST_UNBROKEN = 28
"""Characters of the longest cell of a table whose cells are not broken into lines: it scrolls instead."""


@dataclass(frozen=True)
class Card:
    """A part of the page. ``tables``, ``texts`` and ``folded`` texts: (caption, content). ``width``: empty, ``tall``,
    ``hero`` (two thirds of the page, and tall) or ``wide`` (all of it)."""

    key: str
    title: str
    charts: Sequence[Chart] = ()
    tables: Sequence[tuple[str, Table]] = ()
    texts: Sequence[tuple[str, str]] = ()
    folded: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = ()
    width: str = ""

    @property
    def shows(self) -> bool:
        has_rows = any(table.rows for _, table in self.tables)
        return bool(self.charts or has_rows or self.texts or self.folded or self.notes)


@dataclass(frozen=True)
class Group:
    """Cards under one heading, to which the bar at the top leads."""

    key: str
    title: str
    cards: Sequence[Card]


def page(head: Head, groups: Sequence[Group]) -> str:
    title = f"muster report: {head.title}"
    charts = [chart for group in groups for card in group.cards for chart in card.charts]
    figures = {chart.key: {"data": chart.traces, "layout": chart.layout} for chart in charts}
    links = "".join(f'<a href="#{_text(group.key)}">{_text(group.title)}</a>' for group in groups)
    sections = []
    for group in groups:
        alone = alone_on_paper(group.cards)
        cards = "\n".join(_card(card, card.key in alone) for card in group.cards)
        heading = f"<h2>{_text(group.title)}</h2>"
        sections.append(f'<section id="{_text(group.key)}">{heading}<div class="cards">{cards}</div></section>')
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_text(POLICY)}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">',
        f"<title>{_text(title)}</title><style>{_asset('page.css')}</style></head><body>",
        _head(head),
        f"<nav>{links}</nav><main>",
        *sections,
        "</main>",
        f'<script type="application/json" id="figures">{_json(figures)}</script>',
        f"<script>{plotly_script()}</script>",
        f"<script>{_asset('page.js')}</script>",
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _asset(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def plotly_script() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UsageError("a report needs plotly, which is not installed: pip install plotly") from None
    script: str = get_plotlyjs()
    return script.replace("</script", "<\\/script")


def _head(head: Head) -> str:
    state = f' <span class="state {_text(head.state)}">{_text(head.state)}</span>' if head.state else ""
    parts = [f"<header><h1>{_text(head.title)}{state}</h1>", f'<p class="note">{_text(head.note)}</p>']
    if head.figures:
        figures = (
            f"<div><dt>{_text(one.label)}</dt><dd>{_text(one.value)}<small>{_text(one.detail)}</small></dd></div>"
            for one in head.figures
        )
        parts.append(f"<dl>{''.join(figures)}</dl>")
    if head.failure:
        parts.append(f'<pre class="failure">{_text(head.failure)}</pre>')
    if head.compared:
        parts.append(_table(head.compared))
    return "\n".join([*parts, "</header>"])


def alone_on_paper(cards: Sequence[Card]) -> set[str]:
    """Returns the keys of the cards that no other card would be next to in print, where a row has two."""
    stretches = groupby(cards, lambda card: card.width in ("hero", "wide"))
    return {halves[-1].key for across, found in stretches if not across and len(halves := [*found]) % 2}


def _card(card: Card, alone: bool) -> str:
    parts = [f'<article id="{_text(card.key)}" class="{card.width}{" alone" if alone else ""}">']
    parts += [f"<h3>{_text(card.title)}</h3>"] if card.title else []
    for chart in card.charts:
        entries = (f"<span>{_mark(colour)}{_text(name)}</span>" for colour, name in chart.legend)
        parts.append(f'<p class="note legend">{"".join(entries)}</p>' if chart.legend else "")
        parts.append(f'<div class="chart" role="img" aria-label="{_text(chart.told)}" data-chart="{_text(chart.key)}">')
        parts.append(f"</div><details><summary>The same data as a table</summary>{_table(chart.table)}</details>")
    parts += [f'<p class="note">{_text(note)}</p>' for note in card.notes]
    for caption, one in card.tables:
        parts += [f"<h4>{_text(caption)}</h4>" if caption else "", _table(one)]
    for caption, text in card.texts:
        parts += [f"<h4>{_text(caption)}</h4>" if caption else "", f"<pre>{_text(text)}</pre>"]
    for caption, text in card.folded:
        parts.append(f"<details><summary>{_text(caption)}</summary><pre>{_text(text)}</pre></details>")
    return "\n".join([*parts, "</article>"])


def _table(table: Table) -> str:
    head = "".join(_cell(table, "th", at, name) for at, name in enumerate(table.columns))
    rows = ("".join(_cell(table, "td", at, text) for at, text in enumerate(row)) for row in table.rows)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    thinned = f'<p class="note">{len(table.rows):,} of {table.thinned:,} rows.</p>' if table.thinned else ""
    short = all(len(text) <= LONGEST_UNBROKEN for row in table.rows for text in row)
    kind = ' class="prose"' if table.prose else ' class="short"' if short else ""
    return (
        f'{thinned}<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _cell(table: Table, element: str, at: int, text: str) -> str:
    kind = ' class="number"' if at in table.numbers else ""
    label = f' data-label="{_text(table.columns[at])}"' if table.prose and element == "td" else ""
    scope = ' scope="col"' if element == "th" else ""
    return f"<{element}{scope}{kind}{label}>{_mark(table.colours.get(text))}{_text(text)}</{element}>"


def _mark(colour: str | None) -> str:
    return f'<i style="background:{colour}"></i>' if colour else ""


def _text(text: str) -> str:
    return html.escape(text, quote=True)


def _json(value: object) -> str:
    """Returns JSON that cannot end the script element that contains it."""
    text = json.dumps(_finite(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(value: object) -> object:
    """Replaces numbers that are not finite, as means and ranges of the largest ones are, by null."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: _finite(one) for key, one in value.items()}
        case list() | tuple():
            return [_finite(one) for one in value]
        case _:
            return value
