"""The recipe of a sweep's best trial, as a file to train it again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.sweep.table import TrialRow, number
from trainer.recipe.sweeps.trials import as_text, best_recipe
from trainer.run.sweep import BEST
from trainer.storage import Storage


def best_text(base: Mapping[str, Any], name: str, best: TrialRow, metric: str) -> str:
    """Returns the recipe, with the command that trains it."""
    return (
        f"# The best trial of the sweep {name}: {best.run}, {metric} {number(best.value)} after step {best.step}.\n"
        f"# This trains its recipe as a run of its own:\n#\n"
        f"#   muster run {name}-best.yaml\n\n{as_text(best_recipe(base, f'{name}-best', best.values))}"
    )


def write_best(sweep: Storage, text: str, folder: Path, name: str) -> str:
    """Writes the recipe into the sweep's records, and as ``NAME-best.yaml`` into a folder. A file that is there already
    is replaced only if this sweep has written it. Returns the place of the recipe."""
    file = folder / f"{name}-best.yaml"
    try:
        before = sweep.read(BEST).decode(errors="replace")
    except FileNotFoundError:
        before = text
    sweep.write(BEST, text.encode())
    try:
        if file.exists() and file.read_text(encoding="utf-8", errors="replace") not in (text, before):
            return f"{sweep.uri(BEST)} ({file} is another one, and stays)"
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        return f"{sweep.uri(BEST)} ({file} cannot be written: {error.strerror})"
    return str(file)
