"""The end of a sweep for a person: the table, the failures, the best recipe, and what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from launcher.sweep.best import best_text, write_best
from launcher.sweep.table import TrialRow, best_of, number, print_table, read_rows, table, total
from launcher.terminal.console import print_json
from trainer.recipe import Recipe
from trainer.recipe.sweeps.trials import described
from trainer.run.sweep import FAILED, folder_of, read_sweep_recipe
from trainer.storage import Storage, open_storage


def show_trials(sweep: Storage, home: Storage, out: Console | None) -> None:
    """Prints the trials of a stored sweep as they are now: as a table, or as JSON if ``out`` is None."""
    recipe = read_sweep_recipe(sweep)
    assert recipe.sweep is not None
    rows = read_rows(recipe, sweep, home)
    if out is None:
        print_json([row.to_json() for row in rows])
    else:
        print_table(out, table(rows, recipe.sweep.metric))
        out.print(Text(total(rows)))


def show_end(
    recipe: Recipe,
    base: Mapping[str, Any],
    rows: Sequence[TrialRow],
    out: Console | None,
    console: Console,
    price_per_gpu_hour: float | None,
) -> None:
    """Prints the table to ``out`` unless it is None, and everything else to ``console``."""
    assert recipe.sweep is not None
    metric = recipe.sweep.metric
    if out is not None:
        print_table(out, table(rows, metric, price_per_gpu_hour))
    lines = [total(rows), *(f"{row.run} failed: {row.cause}" for row in rows if row.state == FAILED)]
    if best := best_of(rows):
        sweep = folder_of(open_storage(recipe.storage), recipe.name)
        text = best_text(base, recipe.name, best, metric)
        lines += [
            f"the best: {best.run}, {metric} {number(best.value)}: {described(best.values)}",
            f"its recipe: {write_best(sweep, text, Path(), recipe.name)}",
            f"its adapter: {best.uri}/adapter",
        ]
    lines.append(f"all curves in one page: {shlex.join(['muster', 'report', recipe.run_uri])}")
    for line in lines:
        console.print(Text(line), soft_wrap=True)
