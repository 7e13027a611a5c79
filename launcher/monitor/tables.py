"""Tables for a terminal: one run's checkpoints, the runs of a storage, a saved model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.cells import cell_len
from rich.table import Column, Table
from rich.text import Text

from launcher.monitor.status import Status
from trainer.progress.texts import age

if TYPE_CHECKING:
    from trainer.artifacts.inspect import ArtifactReport

Values = tuple[str, Sequence[str]]
"""A column: its title, and a text for each run."""

NARROWEST_NAME, GAP = 12, 2
STATE_STYLES = {"running": "cyan", "succeeded": "green", "failed": "red", "interrupted": "yellow"}


def checkpoint_lines(status: Status) -> list[Text]:
    """Returns two lines for each checkpoint: its step and time, and its URI alone, to be printed without wrapping."""
    found, best = [], status.best or {}
    for one in status.checkpoints:
        value = f", the best: {best['metric']} {best['value']:.4f}" if one.step == best.get("step") else ""
        found += [Text(f"checkpoint of step {one.step}, {one.committed_at[:19]}{value}:"), Text(one.uri)]
    return found


def runs_table(
    runs: Sequence[Status], now: float, differences: Sequence[Values] = (), width: int | None = None
) -> Table:
    """Returns a row per run. ``now``: Unix time; the age is that of the last step of an active run, else of its end.

    ``differences``: columns of settings. The last columns are left out if all do not fit into ``width``.
    """
    shares = [f" {run.step / run.total_steps:4.0%}" if run.total_steps else "" for run in runs]
    shares = [" early" if run.early_stop else share for run, share in zip(runs, shares, strict=True)]
    losses, evals = ([run.metrics.get(name) for run in runs] for name in ("loss", "eval_loss"))
    columns: list[Values] = [
        ("state", [run.state for run in runs]),
        ("progress", [f"{run.step}/{run.total_steps}{share}" for run, share in zip(runs, shares, strict=True)]),
        ("loss", ["" if loss is None else f"{loss:.4f}" for loss in losses]),
        ("eval", ["" if loss is None else f"{loss:.4f}" for loss in evals]),
        *differences,
        ("age", ["" if run.seen_at is None else age(now - run.seen_at) for run in runs]),
        ("workers", [str(run.world_size) for run in runs]),
        ("attempts", [str(run.attempts) for run in runs]),
    ]
    room = (width or sys.maxsize) - max([NARROWEST_NAME, *(cell_len(run.name) for run in runs)])
    while sum(GAP + max(map(cell_len, [title, *values])) for title, values in columns) > room and len(columns) > 4:
        columns.pop()
    return chosen_table(runs, columns)


def chosen_table(runs: Sequence[Status], columns: Sequence[Values]) -> Table:
    """Returns a row per run with these columns."""
    name = Column("run", overflow="fold", min_width=NARROWEST_NAME)
    others = [Column(title, no_wrap=True) for title, _ in columns]
    table = Table(name, *others, box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for at, run in enumerate(runs):
        cells = [Text(values[at], style=STATE_STYLES.get(values[at], "")) for _, values in columns]
        table.add_row(Text(run.name), *cells)
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
