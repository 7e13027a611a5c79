"""An optimizer that averages trains at one set of weights, and evaluates and saves another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from tests.support.training import losses, run_of, small_recipe, train_here, write_pairs
from trainer.checkpoint.publish import MASTER_FILE, OPTIMIZER_FILE
from trainer.checkpoint.record import CommitRecord
from trainer.recipe import Recipe
from trainer.run import layout
from trainer.run.jsonl import read_rows

WEIGHTS = "adapter_model.safetensors"


def recipe_of(name: str, model: Path, folder: Path, **more: Any) -> Recipe:
    fields = {
        "optimizer": {"name": "schedule_free_adamw", "lr": 2e-2, "weight_decay": 0.01},
        "schedule.warmup_steps": 2,
        "training": {"steps": 4, "global_batch": 4, "micro_batch": 2},
        "data.eval_fraction": 0.2,
        "checkpoint.every_steps": 2,
        **more,
    }
    return small_recipe(name, model, folder, **fields)


def files_of(recipe: Recipe) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of the newest checkpoint."""
    run = run_of(recipe)
    # Keys count down, so that the newest record comes first.
    key = min(one.key for one in run.list(layout.COMMITS))
    record = CommitRecord.from_json(run.read(key), key)
    return {name: load(run.read(record.file_key(name))) for name in (WEIGHTS, MASTER_FILE, OPTIMIZER_FILE)}


@pytest.fixture(scope="module")
def runs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Recipe]:
    folder = tmp_path_factory.mktemp("averaged")
    write_pairs(folder / "data" / "a.jsonl", 40)
    made = {
        "rarely": recipe_of("rarely", tiny_model, folder),
        "often": recipe_of("often", tiny_model, folder, **{"training.eval_every": 1, "checkpoint.every_steps": 1}),
    }
    for recipe in made.values():
        assert train_here(recipe) == "succeeded"
    return made


def test_an_evaluation_and_a_checkpoint_change_no_bit_of_the_training(runs: dict[str, Recipe]) -> None:
    assert losses(runs["often"]) == losses(runs["rarely"])
    mine, theirs = files_of(runs["often"]), files_of(runs["rarely"])
    for file in (WEIGHTS, MASTER_FILE, OPTIMIZER_FILE):
        assert mine[file].keys() == theirs[file].keys()
        assert all(torch.equal(tensor, theirs[file][name]) for name, tensor in mine[file].items()), file


def test_the_saved_adapter_is_the_average(runs: dict[str, Recipe]) -> None:
    """x of the paper, from the weights y of the training and z of the optimizer: x = y + (1 - 1 / beta1) (z - y)."""
    files = files_of(runs["rarely"])
    trained = files[MASTER_FILE]
    for name, y in trained.items():
        x = files[WEIGHTS][name.replace(".default", "")]
        z = files[OPTIMIZER_FILE][f"{name}.z"]
        assert torch.allclose(x, y + (1 - 1 / 0.9) * (z - y), atol=1e-7), name
    assert any(
        not torch.equal(z, trained[n.removesuffix(".z")]) for n, z in files[OPTIMIZER_FILE].items() if n.endswith(".z")
    )


def test_the_evaluation_is_that_of_the_average(runs: dict[str, Recipe]) -> None:
    rows = read_rows(run_of(runs["often"]), layout.METRICS)
    evaluated = {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}
    assert list(evaluated) == [1, 2, 3, 4]
    assert evaluated[4] < evaluated[1]
