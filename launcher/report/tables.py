"""Tables and texts of a report: summary, events, failures, samples, versions and hosts."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from launcher.report.chart import Table, table
from launcher.report.reading import RunRecord
from trainer.progress.texts import duration
from trainer.run.events import (
    EndEvent,
    Event,
    FailureEvent,
    HangEvent,
    ResizeEvent,
    SkippedCheckpointEvent,
    StaleCheckpointEvent,
    StartEvent,
    TextsEvent,
)

MOST_FAILURES = 10
"""The number of failures whose stacks are shown."""


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
        for event in run.told(Event):
            if (what := _what(event)) is not None:
                at = datetime.fromtimestamp(event.time, UTC).strftime("%Y-%m-%d %H:%M:%S") if event.time else None
                rows.append([run.label, at, event.attempt, event.kind, what])
    return table(("run", "time (UTC)", "attempt", "event", "what"), rows, most=None)


def failure_texts(runs: Sequence[RunRecord]) -> list[tuple[str, str]]:
    """Returns (place, stack and advice) of the last failures that have any. A repeated failure is shown once."""
    found: dict[tuple[str, str], str] = {}
    for run in runs:
        for event in run.told(FailureEvent):
            text = "\n\n".join(filter(None, (event.trace, event.advice)))
            head = ", ".join(filter(None, (f"{run.label}, attempt {event.attempt}", _place(event))))
            if text:
                found.pop((run.label, text), None)
                found[run.label, text] = head
    return [(head, text) for (_, text), head in list(found.items())[-MOST_FAILURES:]]


def _what(event: Event) -> str | None:
    """Returns what the table of events says; None for an event that it does not show."""
    match event:
        case StartEvent():
            return f"{event.world_size or len(event.hosts)} workers, after step {event.step}"
        case EndEvent():
            ended = f"{event.state}" + (f" at step {event.step}" if event.step is not None else "")
            return ": ".join(filter(None, (ended, event.cause)))
        case FailureEvent():
            return ": ".join(filter(None, (_place(event), event.cause)))
        case ResizeEvent():
            return event.reason or ""
        case HangEvent():
            return event.cause or ""
        case SkippedCheckpointEvent():
            return event.reason or f"step {event.step}"
        case StaleCheckpointEvent():
            return f"step {event.step}"
    return None


def _place(event: FailureEvent) -> str:
    return " on ".join(filter(None, (f"rank {event.rank}" if event.rank is not None else "", event.host)))


def sample_tables(runs: Sequence[RunRecord]) -> list[tuple[str, Table]]:
    """Returns, for each run that has stored any, a table of texts that it generated before and after training."""
    found = []
    for run in runs:
        rows = []
        for when, event in _texts(run):
            for text in event.texts:
                rows.append([f"{when} (step {event.step})", text.prompt, text.text, text.reference, text.reward])
        if rows:
            used = [i for i in range(5) if i < 3 or any(row[i] not in (None, "") for row in rows)]
            columns = ("when", "prompt", "text", "reference", "reward")
            found.append((run.label, table([columns[i] for i in used], [[row[i] for i in used] for row in rows])))
    return found


def _texts(run: RunRecord) -> list[tuple[str, TextsEvent]]:
    """Returns the first and the last texts that were generated for comparison, else the first and the last of all."""
    events = [event for event in run.told(TextsEvent) if event.texts]
    before = [event for event in events if event.when == "before"][:1]
    after = [event for event in events if event.when == "after"][-1:]
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
        for event in run.told(StartEvent):
            changed = {n: v for n, v in _sorted(event.versions).items() if not _same(n, newest.get(n), v)}
            rows += [[run.label, name, version, event.attempt] for name, version in changed.items()]
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
        for event in run.told(StartEvent):
            for host in dict.fromkeys(event.hosts):
                ranks = [str(rank) for rank, at in enumerate(event.hosts) if at == host]
                devices = [name for name, at in zip(event.devices, event.hosts, strict=False) if at == host]
                kinds = ", ".join(dict.fromkeys(devices)) or None
                rows.append([run.label, event.attempt, host, ", ".join(ranks), kinds, event.strategy.get("kind")])
    return table(("run", "attempt", "host", "ranks", "devices", "strategy"), rows, most=None)
