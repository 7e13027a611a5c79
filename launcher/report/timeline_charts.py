"""Charts of a run over time: the use of its wall time, slow ranks, and the cost of checkpoints."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from statistics import median, quantiles
from typing import Any

from launcher.monitor.goodput import (
    CHECKPOINT,
    COMPILING,
    EVALUATING,
    KINDS,
    LOST,
    STARTING,
    TRAINING,
    WAITING,
    Interval,
)
from launcher.report.chart import Chart, Trace, axes, colour, named_once, safe, table
from launcher.report.reading import RunRecord
from trainer.progress.texts import changes_text
from trainer.run.events import (
    ChangeEvent,
    CheckpointEvent,
    Event,
    FailureEvent,
    HangEvent,
    ResizeEvent,
    StartEvent,
)

SHADES = {
    TRAINING: "#10b981",
    EVALUATING: "#3b82f6",
    CHECKPOINT: "#8b5cf6",
    COMPILING: "#06b6d4",
    STARTING: "#f59e0b",
    LOST: "#ef4444",
    WAITING: "#9ca3af",
}
SYMBOLS: dict[type[Event], tuple[str, str]] = {
    FailureEvent: ("x", "✖"),
    ResizeEvent: ("diamond", "◆"),
    ChangeEvent: ("star", "★"),
    CheckpointEvent: ("triangle-up", "▲"),
    HangEvent: ("square", "■"),
}
"""Plotly's symbol for an event, and a letter that looks like it."""
_MOST_PIECES, MOST_RANK_TICKS = 1500, 16


def timeline_chart(runs: Sequence[RunRecord]) -> Chart | None:
    begun = [run for run in runs if run.went.pieces]
    if not begun:
        return None
    divisor, unit = unit_of(max(run.went.wall_s for run in begun))
    bars: dict[str, list[tuple[str, float, float, str]]] = defaultdict(list)
    rows = []
    for run in begun:
        first = run.went.pieces[0].begin
        for piece in coarse(run.went.pieces, run.went.wall_s / _MOST_PIECES):
            begin, length = (piece.begin - first) / divisor, (piece.end - piece.begin) / divisor
            bars[piece.kind].append((safe(run.label), begin, length, f"attempt {piece.attempt} {piece.phase}".strip()))
            rows.append([run.label, piece.begin - first, piece.end - piece.begin, piece.kind, piece.phase or None])
    traces = [_bars(kind, bars[kind], unit) for kind in KINDS if bars[kind]]
    legend = [(SHADES[kind], kind) for kind in KINDS if bars[kind]]
    for kind, (symbol, letter) in SYMBOLS.items():
        if at := [(run, event) for run in begun for event in run.told(kind) if event.time]:
            traces.append(_marks(kind.kind, symbol, at, divisor))
            legend.append(("", f"{letter} {kind.kind}"))
    layout = _lanes(unit, len(begun), max(run.went.wall_s for run in begun) / divisor, named=len(runs) > 1)
    columns = ("run", "from s", "seconds", "what", "phase")
    return Chart("timeline", "the activity of each run over time", traces, layout, table(columns, rows), legend)


def _lanes(x: str, lanes: int, end: float, *, named: bool) -> dict[str, Any]:
    """Returns the layout of a figure with a bar per run, the first at the top, from 0 to ``end`` without more room."""
    layout = axes(x, "", barmode="overlay", height=100 + 40 * lanes, showlegend=False)
    layout["xaxis"] |= {"range": [0, end]}
    layout["yaxis"] |= {"type": "category", "autorange": "reversed", "visible": named}
    return layout if named else {**layout, "margin": {"l": 10}}


def _bars(kind: str, bars: Sequence[tuple[str, float, float, str]], unit: str) -> Trace:
    lanes, begins, lengths, texts = zip(*bars, strict=True)
    return {
        "type": "bar",
        "orientation": "h",
        "name": kind,
        "y": lanes,
        "base": begins,
        "x": lengths,
        "hovertext": texts,
        "hovertemplate": f"{kind}, %{{hovertext}}: %{{x:.4~g}} {unit}<extra></extra>",
        "textposition": "none",
        "marker": {"color": SHADES[kind], "line": {"width": 0}},
    }


def _marks(name: str, symbol: str, at: Sequence[tuple[RunRecord, Event]], divisor: float) -> Trace:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [(event.time - run.went.pieces[0].begin) / divisor for run, event in at],
        "y": [safe(run.label) for run, _ in at],
        "text": [safe(_mark_text(event)) for _, event in at],
        "cliponaxis": False,
        "marker": {"symbol": symbol, "size": 11, "color": "#111827", "line": {"color": "#fff", "width": 1}},
    }


def _mark_text(event: Event) -> str:
    match event:
        case FailureEvent() | HangEvent():
            return event.cause or event.kind
        case ResizeEvent():
            return event.reason or event.kind
        case ChangeEvent():
            return changes_text(event)
        case CheckpointEvent():
            return f"step {event.step}"
    return event.kind


def coarse(pieces: Iterable[Interval], shortest_s: float) -> list[Interval]:
    """Joins equal neighbours, and adds each piece that is too short to see to the piece before it."""
    found: list[Interval] = []
    for piece in pieces:
        same = found and (found[-1].kind, found[-1].attempt, found[-1].phase) == (
            piece.kind,
            piece.attempt,
            piece.phase,
        )
        if found and (same or piece.end - piece.begin < shortest_s):
            last = found[-1]
            found[-1] = Interval(last.begin, piece.end, last.kind, last.attempt, last.phase)
        else:
            found.append(piece)
    return found


def unit_of(seconds: float) -> tuple[float, str]:
    return (1.0, "seconds") if seconds < 300 else (60.0, "minutes") if seconds < 3 * 3600 else (3600.0, "hours")


def goodput_chart(runs: Sequence[RunRecord]) -> Chart | None:
    begun = [run for run in runs if run.went.wall_s > 0]
    if not begun:
        return None
    traces, rows = [], []
    for kind in KINDS:
        shares = [100 * run.went.seconds[kind] / run.went.wall_s for run in begun]
        bars = {"type": "bar", "orientation": "h", "name": kind, "y": [safe(run.label) for run in begun], "x": shares}
        hover = {"hovertemplate": kind + ": %{x:.2f} %<extra></extra>"}
        traces.append({**bars, **hover, "marker": {"color": SHADES[kind]}})
    for run in begun:
        seconds, wall = run.went.seconds, run.went.wall_s
        rows += [[run.label, kind, seconds[kind], f"{100 * seconds[kind] / wall:.2f} %"] for kind in KINDS]
        rows += [[run.label, f"… {phase}", s, f"{100 * s / wall:.2f} %"] for phase, s in run.went.starting.items()]
        rows.append([run.label, "total", wall, f"{100 * sum(seconds.values()) / wall:.2f} %"])
    legend = [(SHADES[kind], kind) for kind in KINDS if any(run.went.seconds[kind] for run in begun)]
    if len(begun) == 1:
        went = begun[0].went
        legend = [(shade, f"{kind} {went.seconds[kind] / went.wall_s:.1%}") for shade, kind in legend]
    layout = {**_lanes("% of wall time", len(begun), 100, named=len(runs) > 1), "barmode": "stack"}
    columns = ("run", "what", "seconds", "share")
    return Chart("goodput", "the shares of the wall time", traces, layout, table(columns, rows), legend)


def rank_chart(runs: Sequence[RunRecord]) -> Chart | None:
    """Draws each rank's own seconds per step, for all attempts of one run, or the newest attempt of several runs.

    Returns None if there is never more than one rank, which waits for nobody."""
    traces: list[Trace] = []
    rows: list[list[Any]] = []
    for index, run in enumerate(runs):
        attempts = _rank_times(run)
        for attempt in list(attempts) if len(runs) == 1 else list(attempts)[-1:]:
            times, hosts = attempts[attempt], _hosts(run, attempt)
            middles = [median(mine) for mine in times]
            tails = [quantiles(mine, n=20, method="inclusive")[-1] if len(mine) > 1 else mine[0] for mine in times]
            name = safe(f"{run.label}, attempt {attempt}" if len(runs) > 1 else f"attempt {attempt}")
            ranks = list(range(len(times)))
            shade = colour(index if len(runs) > 1 else attempt - 1)
            above = {
                "type": "data",
                "array": [t - m for t, m in zip(tails, middles, strict=True)],
                "symmetric": False,
                "color": "#6b7280",
            }
            bars = {"type": "bar", "name": name, "x": ranks, "y": middles, "error_y": above}
            traces.append({**bars, "marker": {"color": shade}})
            usual = median(middles)
            for rank in ranks:
                share = f"{middles[rank] / usual:.2f} times" if usual > 0 else None
                host = hosts[rank] if rank < len(hosts) else None
                rows.append([run.label, attempt, str(rank), host, middles[rank], tails[rank], share])
    if not traces:
        return _slowest_chart(runs)
    most = max(len(trace["x"]) for trace in traces)
    if most < 2:
        return None
    columns = ("run", "attempt", "rank", "host", "median s", "95 % s", "of the median rank's")
    layout = axes("rank", "", barmode="group")
    layout["xaxis"] |= {"dtick": 1} if most <= MOST_RANK_TICKS else {}
    return Chart("ranks", "the seconds per step in which each rank works alone", traces, layout, table(columns, rows))


def _slowest_chart(runs: Sequence[RunRecord]) -> Chart | None:
    """Draws how often each rank was the slowest, for runs with too many ranks for a time per rank in each row."""
    traces: list[Trace] = []
    rows: list[list[Any]] = []
    for index, run in enumerate(runs):
        timed = [(row.attempt, row.slowest_rank) for row in run.trained if row.slowest_rank is not None]
        if not timed:
            continue
        attempt = timed[-1][0]
        hosts = _hosts(run, attempt)
        counts = Counter(rank for of, rank in timed if of == attempt)
        name, shade = safe(f"{run.label}, attempt {attempt}"), {"color": colour(index)}
        traces.append({"type": "bar", "name": name, "x": list(counts), "y": list(counts.values()), "marker": shade})
        for rank, steps in counts.most_common():
            rows.append([run.label, attempt, str(rank), hosts[rank] if rank < len(hosts) else None, steps])
    if not traces:
        return None
    columns = ("run", "attempt", "rank", "host", "steps in which it was the slowest")
    layout = axes("rank", "steps in which it was the slowest")
    return Chart("ranks", "how often each rank was the slowest", traces, layout, table(columns, rows))


def straggler(run: RunRecord) -> str:
    """Returns a sentence about the slowest rank of the newest attempt with at least two ranks, or ''."""
    for attempt, times in reversed(_rank_times(run).items()):
        middles = [median(mine) for mine in times]
        usual = median(middles)
        if len(middles) < 2 or usual <= 0:
            continue
        slowest = max(range(len(middles)), key=middles.__getitem__)
        hosts = _hosts(run, attempt)
        on = f" on {hosts[slowest]}" if slowest < len(hosts) else ""
        return (
            f"{run.label}, attempt {attempt}: the slowest is rank {slowest}{on}, {middles[slowest] / usual:.2f} times "
            "as long as the median."
        )
    return ""


def _rank_times(run: RunRecord) -> dict[int, list[list[float]]]:
    """Returns the seconds of each rank's steps, by attempt.

    The first step of an attempt, which compiles and warms up, is left out if there are others.
    """
    found: dict[int, list[list[float]]] = {}
    for row in run.trained:
        if row.rank_s:
            found.setdefault(row.attempt, []).append(row.rank_s)
    return {
        attempt: [list(mine) for mine in zip(*(steps[1:] or steps), strict=False)]
        for attempt, steps in sorted(found.items())
    }


def _hosts(run: RunRecord, attempt: int) -> Sequence[str]:
    return next((event.hosts for event in run.told(StartEvent) if event.attempt == attempt), ())


def checkpoint_chart(runs: Sequence[RunRecord]) -> Chart | None:
    traces: list[Trace] = []
    rows = []
    for index, run in enumerate(runs):
        done = run.told(CheckpointEvent)
        if not done:
            continue
        steps = [event.step for event in done]
        stalls, uploads = [event.stall_s for event in done], [event.upload_s for event in done]
        solid = {"color": colour(index)}
        dashed = {**solid, "dash": "dash"}
        marks = {"type": "scatter", "mode": "lines+markers", "x": steps}
        traces.append({**marks, "name": "training blocked", "y": stalls, "line": solid})
        traces.append({**marks, "name": "written in the background", "y": uploads, "line": dashed})
        for event in done:
            mib = None if event.bytes is None else event.bytes / 2**20
            seconds = [event.stall_s, event.snapshot_s, event.upload_s]
            rows.append([run.label, event.attempt, event.step, *seconds, mib, event.coalesced])
    if not traces:
        return None
    columns = ("run", "attempt", "step", "stall s", "of it copying s", "writing s", "MiB", "skipped before it")
    layout = axes("step", "")
    layout["yaxis"] |= {"rangemode": "tozero"}
    return Chart("checkpoints", "the time of each checkpoint", named_once(traces), layout, table(columns, rows))
