"""Charts of a run's data: its composition, the lengths of the samples, and how full the packs are."""

from __future__ import annotations

from collections.abc import Sequence

from launcher.report.chart import Chart, axes, colour, path_end, safe, table
from launcher.report.reading import RunRecord

LONGEST_TITLE = 24
"""Characters of a source beside its bar."""


def composition_chart(runs: Sequence[RunRecord]) -> Chart | None:
    traces, rows = [], []
    titles: dict[str, str] = {}
    for index, run in enumerate(runs):
        parts = run.data.parts
        if not parts:
            continue
        names = [safe(f"{source} ({part})") for part, source, _ in parts]
        for name, (part, source, _) in zip(names, parts, strict=True):
            end = path_end(source)
            short = end if len(end) <= LONGEST_TITLE else f"…{end[1 - LONGEST_TITLE :]}"
            titles[name] = safe(f"{short} ({part})")
        tokens = [counts.tokens for *_, counts in parts]
        bars = {"type": "bar", "orientation": "h", "name": safe(run.label), "y": names, "x": tokens}
        traces.append({**bars, "marker": {"color": colour(index)}})
        for part, source, c in parts:
            rows.append([run.label, part, source, c.rows, c.samples, c.tokens, c.target_tokens, c.truncated, c.dropped])
            rows[-1].append(c.bad_rows)
    if not traces:
        return None
    counted = ("rows", "samples", "tokens", "targets", "truncated", "dropped", "bad rows")
    layout = axes("tokens", "", barmode="group", height=140 + 40 * len(rows))
    layout["yaxis"] |= {
        "type": "category",
        "autorange": "reversed",
        "tickvals": list(titles),
        "ticktext": list(titles.values()),
    }
    return Chart("sources", "tokens of each source", traces, layout, table(("run", "part", "source", *counted), rows))


def length_chart(runs: Sequence[RunRecord]) -> Chart | None:
    traces, rows = [], []
    for index, run in enumerate(runs):
        if run.data.summary is None or not run.data.summary.bins:
            continue
        bins = run.data.summary.bins
        traces.append(
            {
                "type": "bar",
                "name": safe(run.label),
                "x": [(b.low + b.high) / 2 for b in bins],
                "y": [b.samples for b in bins],
                "width": [b.high - b.low + 1 for b in bins],
                "opacity": 0.75,
                "marker": {"color": colour(index), "line": {"width": 1, "color": "#ffffff"}},
            }
        )
        rows += [[run.label, f"{b.low} to {b.high}", b.samples] for b in bins]
    if not traces:
        return None
    layout = axes("tokens of a sample", "samples", barmode="overlay")
    return Chart("lengths", "lengths of the samples", traces, layout, table(("run", "tokens", "samples"), rows))


def fill_told(run: RunRecord) -> str:
    summary = run.data.summary
    if summary is None:
        return f"{run.label}: {run.data.missing}."
    filled = "not packed" if summary.fill is None else f"packs {100 * summary.fill:.1f} % full"
    text = (
        f"half of the samples have up to {summary.median:,} tokens, 95 % up to {summary.p95:,}, the longest "
        f"{summary.longest:,}; {summary.packs:,} packs per epoch, {filled}"
    )
    if summary.sampled is None:
        return f"{run.label}: {text}."
    looked_at, windows = summary.sampled
    return f"{run.label}, from {looked_at:,} of its {windows:,} windows, evenly spread: {text}."
