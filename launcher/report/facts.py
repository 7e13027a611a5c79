"""What is told in words: how the run stands, what happened, its texts, and what it ran on."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from launcher.drawing import duration
from launcher.report.chart import Table, table
from launcher.report.reading import Row, RunRecord

_TOLD = ("start", "failure", "resize", "hang", "skipped_checkpoint", "stale_checkpoint", "end")


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
        for event in run.told(*_TOLD):
            when = event.get("time")
            at = datetime.fromtimestamp(float(when), UTC).strftime("%Y-%m-%d %H:%M:%S") if when is not None else None
            rows.append([run.label, at, event.get("attempt"), event["event"], _said(event)])
    return table(("run", "time (UTC)", "attempt", "event", "what"), rows)


def _said(event: Row) -> str:
    kind, step = event["event"], event.get("step")
    if kind == "start":
        return f"{event.get('world_size') or len(event.get('hosts') or [])} workers, after step {step}"
    if kind == "end":
        return f"{event.get('state')}" + (f" at step {step}" if step is not None else "")
    told = event.get("cause") or event.get("reason") or ""
    where = [f"rank {event['rank']}" if event.get("rank") is not None else "", str(event.get("host") or "")]
    head = " on ".join(part for part in where if part)
    return ": ".join(part for part in (head, str(told)) if part) or f"step {step}"


def sample_tables(runs: Sequence[RunRecord]) -> list[tuple[str, Table]]:
    """The first texts that a run wrote and the last ones, where it has kept any."""
    found = []
    for run in runs:
        events = [e for e in run.told("texts") if e.get("texts")]
        if not events:
            continue
        rows = []
        for event in events if len(events) == 1 else (events[0], events[-1]):
            when = "before" if event is events[0] else "after"
            for text in event["texts"]:
                reference, reward = text.get("reference"), text.get("reward")
                rows.append([f"{when} (step {event['step']})", text.get("prompt"), text.get("text"), reference, reward])
        found.append((run.label, table(("when", "prompt", "text", "reference", "reward"), rows)))
    return found


def version_table(runs: Sequence[RunRecord]) -> Table:
    rows: list[list[Any]] = []
    for run in runs:
        said = run.provenance
        rows += [[run.label, name, said.get(name)] for name in ("muster", "python", "platform", "command")]
        rows += [[run.label, name, version] for name, version in sorted((said.get("packages") or {}).items())]
    return table(("run", "what", "version"), [row for row in rows if row[2] is not None])


def host_table(runs: Sequence[RunRecord]) -> Table:
    rows = []
    for run in runs:
        for event in run.told("start"):
            hosts = list(event.get("hosts") or [])
            for host in dict.fromkeys(hosts):
                ranks = [str(rank) for rank, at in enumerate(hosts) if at == host]
                strategy = (event.get("strategy") or {}).get("kind")
                rows.append([run.label, event["attempt"], host, ", ".join(ranks), strategy])
    return table(("run", "attempt", "host", "ranks", "strategy"), rows)
