"""Builds one HTML page from sections. It contains everything, also plotly's script; all texts are escaped."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.report.chart import Chart, Table
from trainer.errors import UsageError

if TYPE_CHECKING:
    from launcher.report.reading import RunRecord

HERE = Path(__file__).parent

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
"""With this policy, a browser fetches nothing for the page, whatever the page contains."""


@dataclass
class PageSection:
    """A section of the page. ``tables`` and ``texts``: (caption, content); ``wide``: over the page's full width."""

    key: str
    title: str
    charts: Sequence[Chart] = ()
    tables: Sequence[tuple[str, Table]] = ()
    texts: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = field(default_factory=list)
    wide: bool = False


def page(runs: Sequence[RunRecord], sections: Sequence[PageSection]) -> str:
    title = "muster report: " + ", ".join(run.label for run in runs)
    figures = {c.key: {"data": c.traces, "layout": c.layout} for section in sections for c in section.charts}
    links = "".join(f'<a href="#{_text(s.key)}">{_text(s.title)}</a>' for s in sections)
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_text(POLICY)}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">',
        f"<title>{_text(title)}</title><style>{_asset('page.css')}</style></head><body>",
        f"<header><h1>{_text(title)}</h1><nav>{links}</nav></header><main>",
        *map(_section, sections),
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


def _section(section: PageSection) -> str:
    parts = [
        f'<section id="{_text(section.key)}"{" class=wide" if section.wide else ""}><h2>{_text(section.title)}</h2>'
    ]
    parts += [f'<p class="note">{_text(note)}</p>' for note in section.notes]
    for chart in section.charts:
        parts.append(f'<div class="chart" role="img" aria-label="{_text(chart.told)}" data-chart="{_text(chart.key)}">')
        parts.append(f"</div><details><summary>The same data as a table</summary>{_table(chart.table)}</details>")
    for caption, one in section.tables:
        parts += [f"<h3>{_text(caption)}</h3>" if caption else "", _table(one)]
    for caption, text in section.texts:
        parts.append(f"<h3>{_text(caption)}</h3><pre>{_text(text)}</pre>")
    return "\n".join([*parts, "</section>"])


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in table.columns)
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    thinned = f'<p class="note">{len(table.rows):,} of {table.thinned:,} rows.</p>' if table.thinned else ""
    if not table.rows:
        return '<p class="note">None.</p>'
    return f'{thinned}<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _text(text: str) -> str:
    return html.escape(text, quote=True)


def _json(value: object) -> str:
    """Returns JSON that cannot end the script element that contains it."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
