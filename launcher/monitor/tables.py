"""Tables for a terminal: one run's checkpoints, the runs of a storage, a saved model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Column, Table
from rich.text import Text

from launcher.monitor.status import Status
from trainer.progress.texts import age

if TYPE_CHECKING:
    from trainer.artifacts.inspect import ArtifactReport


STATE_STYLES = {"running": "cyan", "succeeded": "green", "failed": "red", "interrupted": "yellow"}


def checkpoint_lines(status: Status) -> list[Text]:
    """Returns two lines for each checkpoint: its step and time, and its URI alone, to be printed without wrapping."""
    found = []
    for one in status.checkpoints:
        found += [Text(f"checkpoint of step {one.step}, {one.committed_at[:19]}:"), Text(one.uri)]
    return found


def runs_table(runs: list[Status], now: float) -> Table:
    """Returns a row per run. ``now``: Unix time; the age is that of the last step of an active run, else of its end."""
    run_name = Column("run", overflow="fold", min_width=12)
    narrow = [
        Column(name, no_wrap=True) for name in ("state", "progress", "loss", "eval", "age", "workers", "attempts")
    ]
    table = Table(run_name, *narrow, box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for run in runs:
        steps = f"{run.step}/{run.total_steps}" + (f" {run.step / run.total_steps:4.0%}" if run.total_steps else "")
        losses = (run.metrics.get(name) for name in ("loss", "eval_loss"))
        shown = ["" if loss is None else f"{loss:.4f}" for loss in losses]
        since = "" if run.seen_at is None else age(now - run.seen_at)
        state = Text(run.state, style=STATE_STYLES.get(run.state, ""))
        table.add_row(Text(run.name), state, steps, *shown, since, str(run.world_size), str(run.attempts))
    return table


def described_lines(found: ArtifactReport) -> list[Text]:
    """Returns the paths, to be printed without wrapping above the table."""
    return [Text(found.uri), *([Text(f"base: {found.base['path']}")] if found.base else [])]


def described_table(found: ArtifactReport) -> Table:
    table = Table(box=box.SIMPLE, show_header=False)

    def row(name: str, value: str) -> None:
        table.add_row(Text(name), Text(value))  # as Text, brackets are not read as markup

    row("kind", f"{found.kind}, task {found.task}, method {found.method}")
    if found.base:
        held = f"{found.base['dtype']}, quantization {found.base['quantization']}"
        row("base", f"revision {found.base['revision']}, {held}")
    for name, value in found.settings.items():
        row(name, ", ".join(map(str, value)) if isinstance(value, list) else str(value))
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in found.dtypes.items())
    row("tensors", f"{found.tensors:,} ({dtypes}), {found.parameters:,} parameters, {found.bytes:,} bytes")
    for name, size in found.files.items():
        row(name, f"{size:,} bytes")
    for name, value in found.facts.items():
        row(name, repr(value) if isinstance(value, str) else str(value))
    row("whole", "yes" if found.whole else "no: " + "\n".join(found.problems))
    return table
