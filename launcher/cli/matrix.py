"""The support matrix for people: what works with what, in 80 columns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from trainer.recipe.matrix import SIGNS, Refusal, axes, cells, refusal, signs

WIDTH = 80


def matrix_table(tasks: tuple[str, ...]) -> Table:
    """Methods against strategies, of tasks that have the same table; a cell names the quantisations that work there."""
    sides = axes()
    title = f"task{'s' if len(tasks) > 1 else ''} {', '.join(tasks)}"
    table = Table("method", *sides["strategy"], box=box.SIMPLE, title=title, title_justify="left")
    for method in sides["method"]:
        table.add_row(method, *(" ".join(signs(method, strategy, tasks[0])).rstrip() for strategy in sides["strategy"]))
    return table


def legend() -> Text:
    said = ", ".join(f"{letter} {name}" for name, letter in SIGNS.items())
    return Text(f"model.quantization: {said}. `muster validate` says what works instead of a gap.")


def reasons(refusals: tuple[Refusal, ...]) -> Table:
    """Why there are gaps."""
    table = Table("does not work together", "because", box=box.SIMPLE)
    for refused in refusals:
        sides = [f"{side} {', '.join(refused.values(side))}" for side in refused.sides()]
        table.add_row("\n".join(sides), refused.why)
    return table


def as_rows(tasks: Iterable[str]) -> list[dict[str, Any]]:
    """Every cell of these tasks, with why it does not work where it does not."""
    wanted = set(tasks)
    found = ((cell, refusal(cell)) for cell in cells() if cell.task in wanted)
    return [{**cell._asdict(), "works": why is None, "why": why.why if why else None} for cell, why in found]
