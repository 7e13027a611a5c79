"""Tables and texts of a report: summary, events, failures, samples, versions and hosts."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from launcher.report.chart import Table, table
from launcher.report.reading import Row, RunRecord
from launcher.terminal.status_text import duration

MOST_FAILURES = 10
"""The number of failures whose stacks are shown."""
_SHOWN = ("start", "failure", "resize", "hang", "skipped_checkpoint", "stale_checkpoint", "end")


def summary_table(runs: Sequence[RunRecord]) -> Table:
    columns = ("run", "state", "step", "attempts", "workers", "loss", "eval loss", "wall time", "goodput", "where")
    return table(columns, [_summary(run) for run in runs])


def _summary(run: RunRecord) -> list[Any]:
    status = run.status
    return [
        run.label,
        status.state,
        f"{status.step:,} of {status.total_steps:,}",
        max(status.attempts, *run.starts, 0),
        status.world_size,
        status.metrics.get("loss"),
        status.metrics.get("eval_loss"),
        duration(run.went.wall_s),
        f"{100 * run.went.share:.1f} %",
        status.uri,
    ]


def happenings(runs: Sequence[RunRecord]) -> Table:
    rows = []
    for run in runs:
        for event in run.told(*_SHOWN):
            when = event.get("time")
            at = datetime.fromtimestamp(float(when), UTC).strftime("%Y-%m-%d %H:%M:%S") if when is not None else None
            rows.append([run.label, at, event.get("attempt"), event["event"], _what(event)])
    return table(("run", "time (UTC)", "attempt", "event", "what"), rows, most=None)


def failure_texts(runs: Sequence[RunRecord]) -> list[tuple[str, str]]:
    """Returns (place, stack and advice) of the last failures that have any. A repeated failure is shown once."""
    found: dict[tuple[str, str], str] = {}
    for run in runs:
        for event in run.told("failure", "end"):
            values = [event.get(name) or "" for name in ("trace", "advice")]
            texts = ["\n".join(map(str, value)) if isinstance(value, list) else str(value) for value in values]
            text = "\n\n".join(filter(None, texts))
            head = ", ".join(filter(None, (f"{run.label}, attempt {event.get('attempt')}", _place(event))))
            if text:
                found.pop((run.label, text), None)
                found[run.label, text] = head
    return [(head, text) for (_, text), head in list(found.items())[-MOST_FAILURES:]]


def _what(event: Row) -> str:
    kind, step = event["event"], event.get("step")
    if kind == "start":
        return f"{event.get('world_size') or len(event.get('hosts') or [])} workers, after step {step}"
    if kind == "end":
        ended = f"{event.get('state')}" + (f" at step {step}" if step is not None else "")
        return ": ".join(filter(None, (ended, str(event.get("cause") or ""))))
    cause = event.get("cause") or event.get("reason") or ""
    return ": ".join(filter(None, (_place(event), str(cause)))) or f"step {step}"


def _place(event: Row) -> str:
    where = [f"rank {event['rank']}" if event.get("rank") is not None else "", str(event.get("host") or "")]
    return " on ".join(filter(None, where))


def sample_tables(runs: Sequence[RunRecord]) -> list[tuple[str, Table]]:
    """Returns, for each run that has stored any, a table of texts that it generated before and after training."""
    found = []
    for run in runs:
        rows = []
        for when, event in _texts(run):
            for text in event["texts"]:
                cells = [text.get(name) for name in ("prompt", "text", "reference", "reward")]
                rows.append([f"{when} (step {event.get('step')})", *cells])
        if rows:
            used = [i for i in range(5) if i < 3 or any(row[i] not in (None, "") for row in rows)]
            columns = ("when", "prompt", "text", "reference", "reward")
            found.append((run.label, table([columns[i] for i in used], [[row[i] for i in used] for row in rows])))
    return found


def _texts(run: RunRecord) -> list[tuple[str, Row]]:
    """Returns the first and the last texts that were generated for comparison, else the first and the last of all."""
    events = [e for e in run.told("texts") if e.get("texts")]
    before = [e for e in events if e.get("when") == "before"][:1]
    after = [e for e in events if e.get("when") == "after"][-1:]
    if not before and not after:
        before, after = events[:1], events[1:][-1:]
    return [*(("before", e) for e in before), *(("after", e) for e in after)]


def version_table(runs: Sequence[RunRecord]) -> Table:
    """Returns the versions that were frozen with the recipe, and those that changed at each attempt."""
    rows: list[list[Any]] = []
    for run in runs:
        frozen = {name: run.provenance.get(name) for name in ("muster", "python", "platform", "command", "unreadable")}
        newest = {n: v for n, v in {**frozen, **_sorted(run.provenance.get("packages"))}.items() if v is not None}
        rows += [[run.label, name, version, None] for name, version in newest.items()]
        for event in run.told("start"):
            changed = {n: v for n, v in _sorted(event.get("versions")).items() if not _same(n, newest.get(n), v)}
            rows += [[run.label, name, version, event.get("attempt")] for name, version in changed.items()]
            newest |= changed
    return table(("run", "what", "version", "from attempt"), rows)


def _same(name: str, before: Any, now: Any) -> bool:
    # A worker's copy of the code may be outside of the checkout; then it does not know its commit.
    return bool(now == before or (name == "muster" and now == str(before).partition("+")[0]))


def _sorted(versions: Any) -> dict[str, Any]:
    return dict(sorted(versions.items())) if isinstance(versions, dict) else {}


def host_table(runs: Sequence[RunRecord]) -> Table:
    rows = []
    for run in runs:
        for event in run.told("start"):
            hosts = list(event.get("hosts") or [])
            for host in dict.fromkeys(hosts):
                ranks = [str(rank) for rank, at in enumerate(hosts) if at == host]
                strategy = (event.get("strategy") or {}).get("kind")
                devices = [name for name, at in zip(event.get("devices") or [], hosts, strict=False) if at == host]
                kinds = ", ".join(dict.fromkeys(map(str, devices))) or None
                rows.append([run.label, event.get("attempt"), host, ", ".join(ranks), kinds, strategy])
    return table(("run", "attempt", "host", "ranks", "devices", "strategy"), rows, most=None)
