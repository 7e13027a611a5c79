"""A run that is resumed with other settings is the run that was never interrupted."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from tests.support.training import adapter_bytes, ledger, losses, run_of, small_recipe, train_here, write_pairs
from trainer.checkpoint.publish import finished
from trainer.recipe import Recipe
from trainer.run import layout


def order(recipe: Recipe) -> dict[int, list[str]]:
    """{step: its samples in their order}, whatever its micro-batches were."""
    fed = ledger(recipe)
    return {step: list(chain(*(fed[key] for key in sorted(fed) if key[0] == step))) for step, _ in fed}


@pytest.fixture
def recipe(tiny_model: Path, tmp_path: Path) -> Any:
    write_pairs(tmp_path / "data" / "a.jsonl", 40)
    return lambda name, **changes: small_recipe(name, tiny_model, tmp_path, **{"adapter.dropout": 0.0, **changes})


def test_another_micro_batch_and_checkpointing_continue_the_same_run(recipe: Any) -> None:
    assert train_here(recipe("straight")) == "succeeded"
    assert train_here(recipe("changed", **{"training.stop_after": 5})) == "interrupted"
    smaller = {"training.micro_batch": 1, "training.gradient_checkpointing": True}
    assert train_here(recipe("changed", **smaller)) == "succeeded"
    straight, changed = losses(recipe("straight")), losses(recipe("changed"))
    assert list(straight) == list(changed) == list(range(1, 11))
    assert changed == pytest.approx(straight, abs=1e-5)
    assert order(recipe("changed")) == order(recipe("straight"))


@pytest.mark.parametrize("length", ["steps", "epochs"])
def test_a_finished_run_that_is_made_longer_is_the_longer_run(recipe: Any, length: str) -> None:
    def of(name: str, count: int) -> Recipe:
        lengths = {"steps": None, "epochs": None} | {length: count}
        return recipe(name, **{f"training.{key}": value for key, value in lengths.items()}, **{"adapter.dropout": 0.1})

    short, long = (4, 7) if length == "steps" else (1, 2)
    assert train_here(of("straight", long)) == "succeeded"
    assert train_here(of("longer", short)) == "succeeded"
    run = run_of(of("longer", short))
    assert finished(run, of("longer", short).training) is not None
    assert finished(run, of("longer", long).training) is None
    assert train_here(of("longer", long)) == "succeeded"
    assert finished(run, of("longer", long).training) is not None
    assert adapter_bytes(of("longer", long)) == adapter_bytes(of("straight", long))
    assert losses(of("longer", long)) == losses(of("straight", long))
    assert order(of("longer", long)) == order(of("straight", long))
    config = f"{layout.ADAPTER}/adapter_config.json"
    assert run.read(config) == run_of(of("straight", long)).read(config)


def test_a_longer_run_that_stops_on_its_way_is_not_finished(recipe: Any) -> None:
    assert train_here(recipe("stops", **{"training.steps": 4})) == "succeeded"
    longer = recipe("stops", **{"training.steps": 8, "training.stop_after": 6})
    assert train_here(longer) == "interrupted"
    assert finished(run_of(longer), longer.training) is None
    assert train_here(recipe("stops", **{"training.steps": 8})) == "succeeded"
