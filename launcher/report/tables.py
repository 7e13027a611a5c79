"""Tables and texts of a report: events, failures, samples, versions and hosts."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from launcher.report.chart import Table, table, thin
from launcher.report.reading import RunRecord
from trainer.progress.texts import changes_text, early_stop_text, plural
from trainer.run.events import (
    BestEvent,
    ChangeEvent,
    EarlyStopEvent,
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
MOST_BESIDE = 4
EVALUATION = "evaluation"


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
            begun = f", from {event.begins_from.get('uri')}" if event.begins_from and not event.step else ""
            return f"{plural(event.world_size or len(event.hosts), 'worker')}, after step {event.step}{begun}"
        case EndEvent():
            ended = f"{event.state}" + (f" at step {event.step}" if event.step is not None else "")
            return ": ".join(filter(None, (ended, event.cause)))
        case FailureEvent():
            return ": ".join(filter(None, (_place(event), event.cause)))
        case ChangeEvent():
            return f"for the next attempt: {changes_text(event)}"
        case ResizeEvent():
            return event.reason or ""
        case HangEvent():
            return event.cause or ""
        case SkippedCheckpointEvent():
            return event.reason or f"step {event.step}"
        case StaleCheckpointEvent():
            return f"step {event.step}"
        case BestEvent():
            return f"step {event.step}: {event.metric} {event.value:.4f}" if event.value is not None else None
        case EarlyStopEvent():
            return f"at step {event.step}: {early_stop_text(event)}"
    return None


def _place(event: FailureEvent) -> str:
    return " on ".join(filter(None, (f"rank {event.rank}" if event.rank is not None else "", event.host)))


def sample_tables(runs: Sequence[RunRecord]) -> list[tuple[str, Table]]:
    """Returns tables with a row per prompt: the text before training next to the text after it, and the reference.

    The texts of a few runs stand side by side in one table; more runs have a table each."""
    told = {run.label: moments for run in runs if (moments := _texts(run))}
    if 1 < len(told) <= MOST_BESIDE:
        first = next(iter(told.values()))
        beside = [*first[:-1], *((f"after, {label}", moments[-1][1]) for label, moments in told.items())]
        return [("", _sample_table(beside))]
    return [(label if len(runs) > 1 else "", _sample_table(moments)) for label, moments in told.items()]


def _sample_table(moments: Sequence[tuple[str, TextsEvent]]) -> Table:
    columns = ["prompt", *(f"{when} (step {event.step})" for when, event in moments), "reference"]
    rows: dict[str, list[Any]] = {}
    for at, (_, event) in enumerate(moments, start=1):
        for text in event.texts:
            row = rows.setdefault(text.sample or text.prompt or "", [text.prompt, *(None for _ in columns[1:])])
            rated = {"reward": text.reward, "score": text.score}
            notes = [f"{name} {value:.4g}" for name, value in rated.items() if value is not None]
            row[at], row[-1] = "\n\n".join(filter(None, (text.text, *notes))), text.reference or row[-1]
    used = [at for at in range(len(columns)) if any(row[at] for row in rows.values())]
    return table([columns[at] for at in used], [[row[at] for at in used] for row in rows.values()], prose=True)


def answer_tables(runs: Sequence[RunRecord]) -> list[tuple[str, Table]]:
    """Returns a table for each run with generated answers: a row per question, with its answer in a few evaluations,
    the first and the last among them, and the reference."""
    tables = []
    for run in runs:
        # A later attempt may have repeated an evaluation.
        by_step = {e.step or 0: e for e in run.told(TextsEvent) if e.when == EVALUATION and e.texts}
        if by_step:
            moments = [(EVALUATION, event) for _, event in thin(sorted(by_step.items()), MOST_BESIDE)]
            tables.append((run.label if len(runs) > 1 else "", _sample_table(moments)))
    return tables


def _texts(run: RunRecord) -> list[tuple[str, TextsEvent]]:
    """Returns the first and the last texts that were generated for comparison, else the first and the last of all."""
    events = [event for event in run.told(TextsEvent) if event.texts and event.when != EVALUATION]
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
            changed = {
                name: version for name, version in _sorted(event.versions).items() if newest.get(name) != version
            }
            # A worker's copy of the code may be outside of the checkout; then it does not know its commit.
            if changed.get("muster") == str(newest.get("muster")).partition("+")[0]:
                del changed["muster"]
            rows += [[run.label, name, version, event.attempt] for name, version in changed.items()]
            newest |= changed
    return table(("run", "what", "version", "from attempt"), rows)


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
