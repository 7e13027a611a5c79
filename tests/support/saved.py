"""Small runs on the tiny model for the tests of what comes after training; each is trained once per folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.training import run_of, small_recipe, train_here
from trainer.recipe import Recipe
from trainer.run import layout


def trained(name: str, model: Path, folder: Path, **changes: Any) -> Recipe:
    """The recipe of a finished run over ``folder/data``. The same name is the same run, whatever the changes."""
    few = {"training.steps": 3, "checkpoint.every_steps": 3, "optimizer.lr": 2e-2, "adapter.dropout": 0.0}
    recipe = small_recipe(name, model, folder, **{**few, **changes})
    if not adapter_of(recipe).is_dir():
        assert train_here(recipe) == "succeeded"
    return recipe


def adapter_of(recipe: Recipe) -> Path:
    return Path(run_of(recipe).url, layout.ADAPTER)
