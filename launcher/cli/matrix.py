"""``muster matrix``: the methods, quantisations, strategies and tasks that work together, in 80 columns or as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from launcher.cli import completion
from launcher.cli.options import PluginsOption
from launcher.terminal.console import stdout
from trainer.recipe.plugins import use_installed
from trainer.recipe.rules.matrix import SIGNS, alike, axes, cells, refusal, refusals, sides_of, signs, values_of
from trainer.recipe.rules.refusal import Refusal
from trainer.recipe.tasks import TASKS

WIDTH = 80


def matrix(
    task: Annotated[
        str | None, typer.Option(autocompletion=completion.one_of(*TASKS.names()), help="only this task")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="all cells as a JSON list on stdout")] = False,
    plugins: PluginsOption = False,
) -> None:
    """Show which method, quantisation, strategy and task work together."""
    if plugins:
        use_installed()
    tasks = TASKS.names()
    if task is not None:
        TASKS.use(task)
        TASKS[task]  # raises UsageError for an unknown name
        tasks = (task,)
    if as_json:
        print(json.dumps(as_rows(tasks)))
        return
    console = stdout(width=min(WIDTH, stdout().width))
    for group in alike(tasks):
        console.print(matrix_table(group))
    console.print(legend())
    console.print(reasons([r for r in refusals() if not r.task or set(values_of(r, "task")) & set(tasks)]))


def matrix_table(tasks: tuple[str, ...]) -> Table:
    """Returns methods by strategies, for tasks with the same table. A cell names the quantisations that work there."""
    sides = axes()
    title = f"task{'s' if len(tasks) > 1 else ''} {', '.join(tasks)}"
    table = Table("method", *sides["strategy"], box=box.SIMPLE, title=title, title_justify="left")
    for method in sides["method"]:
        table.add_row(method, *(" ".join(signs(method, strategy, tasks[0])).rstrip() for strategy in sides["strategy"]))
    return table


def legend() -> Text:
    said = ", ".join(f"{letter} {name}" for name, letter in SIGNS.items())
    return Text(f"model.quantization: {said}. `muster validate` says what works instead of a gap.")


def reasons(found: Sequence[Refusal]) -> Table:
    """Returns the reasons of the gaps."""
    table = Table("does not work together", "because", box=box.SIMPLE)
    for refused in found:
        sides = [f"{side} {', '.join(values_of(refused, side))}" for side in sides_of(refused)]
        table.add_row("\n".join(sides), refused.why)
    return table


def as_rows(tasks: Iterable[str]) -> list[dict[str, Any]]:
    """Returns every cell of these tasks, with the reason if it does not work."""
    wanted = set(tasks)
    found = ((cell, refusal(cell)) for cell in cells() if cell.task in wanted)
    return [{**cell._asdict(), "works": why is None, "why": why.why if why else None} for cell, why in found]
