"""The rows of installed plug-ins, each by the contract of its table."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.model import load_tokenizer
from trainer.optim.schedules import learning_rate
from trainer.recipe import Recipe, ScheduleSection
from trainer.recipe.formats import FORMATS, formats_of
from trainer.recipe.methods import METHODS
from trainer.recipe.optimizers import OPTIMIZERS, SCHEDULES
from trainer.recipe.strategies import STRATEGIES
from trainer.recipe.tasks import TASKS, TaskRow
from trainer.registry import Registry, key_of

from . import methods, optimizers, tasks
from .data import KINDS
from .formats import check_rows
from .training import losses, small_recipe, train_here, write_pairs, write_rows

HEAVY = "torch numpy transformers peft ray pyarrow"
"""Libraries that a recipe is checked without."""


def test_a_row_is_imported_without_heavy_libraries(table_and_name: tuple[Registry[Any], str]) -> None:
    table, name = table_and_name
    code = (
        "import sys; from trainer.recipe.plugins import TABLES\n"
        f"next(t for t in TABLES.values() if t.group == {table.group!r}).use({name!r})\n"
        f"print(*(library for library in {HEAVY.split()} if library in sys.modules))"
    )
    path = os.pathsep.join(filter(None, sys.path))
    child = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout.split() == [], "import them in the module of the code, not in that of the row"


def test_the_code_of_a_row_is_there(table_and_name: tuple[Registry[Any], str]) -> None:
    table, name = table_and_name
    table.use(name)
    assert callable(table.load(name))
    assert key_of(name).isidentifier(), "a recipe names it, and its settings are a section of that name"


def recipe_of(name: str, row: Any, model: Path, folder: Path, **changes: Any) -> Recipe:
    write_pairs(folder / "data" / "pairs.jsonl", 48)
    return small_recipe(name, model, folder, **{**changes, **row.example})


@pytest.mark.parametrize("check", tasks.CHECKS, ids=lambda check: check.__name__)
def test_a_task(check: Callable[[tasks.Make], None], task_name: str, tiny_model: Path, tmp_path: Path) -> None:
    TASKS.use(task_name)
    row = TASKS[task_name]
    source = data_for(task_name, row, tmp_path)
    packs = FORMATS[source["format"]].unpacked is None and not row.generates
    changes = {"task": task_name, "data.train": [source], "data.packing": packs}
    check(lambda name, **more: recipe_of(name, row, tiny_model, tmp_path, **{**changes, **more}))


def data_for(task: str, row: TaskRow, folder: Path) -> dict[str, str]:
    """Writes rows that the task learns from; returns their source."""
    path = folder / "task.jsonl"
    kind = next((kind for kind in row.learns_from if kind in KINDS), None)
    if kind is not None:
        format, write = KINDS[kind]
        write(path, 48)
        return {"path": str(path), "format": format}
    for name in FORMATS.offered():
        FORMATS.use(name)
    own = next((name for name in formats_of(task) if FORMATS[name].examples), None)
    assert own is not None, f"no installed format with examples gives {' or '.join(row.learns_from)}"
    rows = FORMATS[own].examples
    write_rows(path, [rows[i % len(rows)] for i in range(48)])
    return {"path": str(path), "format": own}


@pytest.mark.parametrize("check", methods.CHECKS, ids=lambda check: check.__name__)
def test_a_method(
    check: Callable[[methods.Make, Path], None], method_name: str, tiny_model: Path, tmp_path: Path
) -> None:
    METHODS.use(method_name)
    row, folder = METHODS[method_name], tmp_path / "files"
    folder.mkdir()
    training = {"steps": methods.STEPS, "global_batch": 4, "micro_batch": 4, "gradient_checkpointing": False}
    changes = {"adapter": {"method": method_name}, "training": training, "optimizer.lr": row.lr}
    check(lambda **more: recipe_of("method", row, tiny_model, tmp_path, **{**changes, **more}), folder)


def test_a_format(format_name: str, tiny_model: Path) -> None:
    FORMATS.use(format_name)
    row = FORMATS[format_name]
    assert row.examples, "give the row `examples`: rows of a file that the format takes"
    for example in row.examples:
        check_rows(format_name, example, load_tokenizer(tiny_model))


@pytest.mark.parametrize("check", optimizers.CHECKS, ids=lambda check: check.__name__)
def test_an_optimizer(check: Callable[[str, Path], None], optimizer_name: str, tmp_path: Path) -> None:
    OPTIMIZERS.use(optimizer_name)
    check(optimizer_name, tmp_path)


def test_a_schedule(schedule_name: str) -> None:
    SCHEDULES.use(schedule_name)
    section = ScheduleSection(name=schedule_name, warmup_steps=3)
    rates = [learning_rate(section, 1.0, step, 50) for step in range(1, 52)]
    assert all(math.isfinite(rate) and 0.0 <= rate <= 1.0 for rate in rates), rates
    assert rates[:3] == sorted(rates[:3]), "the warm-up is muster's"
    assert all(rate > 0 for rate in rates[:50]), "a step with the rate 0 is computed for nothing"


def test_a_strategy(strategy_name: str, tiny_model: Path, tmp_path: Path) -> None:
    STRATEGIES.use(strategy_name)
    row = STRATEGIES[strategy_name]
    one, plain = (
        recipe_of(kind, row, tiny_model, tmp_path, **{"strategy.kind": kind}) for kind in (strategy_name, "ddp")
    )
    assert train_here(one) == train_here(plain) == "succeeded"
    assert losses(one) == pytest.approx(losses(plain), abs=1e-5)
