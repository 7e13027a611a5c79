"""Every cell that the support matrix allows trains for two steps on two ranks, and learns something."""

from __future__ import annotations

import math
import os
import random
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from tests.support.tasks import task_recipe, write_task_data
from tests.support.training import losses, run_of, train_in_processes
from trainer.recipe import Recipe
from trainer.recipe.methods import METHODS
from trainer.recipe.rules.matrix import Cell, axes, cells, refusal
from trainer.run import layout
from trainer.storage import Storage

SEED = int(os.environ.get("MATRIX_SEED", "20260715"))
SAMPLED = 8
PER_GROUP = 40
"""Cells that are trained in the same processes, whose start takes longer than a cell."""

ALLOWED = [cell for cell in cells() if refusal(cell) is None]


def _sample() -> list[Cell]:
    """Some of all, each strategy about as often as the others."""
    draw, chosen = random.Random(SEED), []
    strategies = axes()["strategy"]
    for i in range(SAMPLED):
        chosen.append(draw.choice([c for c in ALLOWED if c.strategy == strategies[i % len(strategies)]]))
    return sorted(set(chosen))


def _groups() -> list[tuple[Cell, ...]]:
    by_kind: dict[tuple[str, str, str], list[Cell]] = defaultdict(list)
    for cell in ALLOWED:
        by_kind[cell.task, cell.strategy, cell.quantization].append(cell)
    return [tuple(some[i : i + PER_GROUP]) for some in by_kind.values() for i in range(0, len(some), PER_GROUP)]


def _name(group: tuple[Cell, ...]) -> str:
    first, last = group[0], group[-1]
    return f"{first.task}-{first.strategy}-{first.quantization}-{first.method}-to-{last.method}"


def _recipe(cell: Cell, model: Path, folder: Path) -> Recipe:
    changes: dict[str, Any] = {
        "adapter": _adapter(cell.method),
        "model.quantization": cell.quantization,
        "strategy.kind": cell.strategy,
        "training.steps": 2,
        "checkpoint.every_steps": 2,
        "optimizer.lr": 1e-2,
    }
    return task_recipe(cell.task, "-".join(cell), model, folder, **changes)


def _adapter(method: str) -> dict[str, Any]:
    if method == "peft":
        return {"method": {"peft": "MISS", "r": 4}}
    small = {"rank": 4, "target_rank": 2, "alpha": 8, "virtual_tokens": 4}
    return {"method": method} | {key: value for key, value in small.items() if key in _settings(method)}


def _settings(method: str) -> Collection[str]:
    return METHODS[method].settings


def _train(group: tuple[Cell, ...] | list[Cell], model: Path, folder: Path) -> None:
    for task in {cell.task for cell in group}:
        write_task_data(folder, task)
    recipes = [_recipe(cell, model, folder) for cell in group]
    train_in_processes(recipes, 2)
    for recipe in recipes:
        _has_learnt(recipe, run_of(recipe))


def _has_learnt(recipe: Recipe, run: Storage) -> None:
    """Both steps have a loss, and the final adapter was verified, which includes that it has moved."""
    got = losses(recipe)
    assert sorted(got) == [1, 2]
    assert all(math.isfinite(loss) for loss in got.values()), recipe.name
    assert any(o.key.endswith(".safetensors") for o in run.list(layout.ADAPTER)), recipe.name


@pytest.mark.timeout(600)
def test_a_sample_of_the_matrix_trains(tiny_model: Path, tmp_path: Path) -> None:
    _train(_sample(), tiny_model, tmp_path)


@pytest.mark.night
@pytest.mark.timeout(900)
@pytest.mark.parametrize("group", _groups(), ids=_name)
def test_the_matrix_trains(group: tuple[Cell, ...], tiny_model: Path, tmp_path: Path) -> None:
    _train(group, tiny_model, tmp_path)
