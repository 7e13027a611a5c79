"""`Recipe.load`: files, names and mappings, with values by dotted key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.training import small_recipe
from trainer.errors import RecipeError
from trainer.recipe import Recipe, dump

VALUES: dict[str, Any] = {
    "optimizer.lr": 1e-05,
    "name": "123",
    "seed": 5,
    "checkpoint.keep_best": None,
    "adapter.target_modules": ["q_proj", "v_proj"],
    "training": {"steps": 7, "global_batch": 4, "micro_batch": 2},
    "model.path": "über/\U0001f600 'a' \"b\"",
}


@pytest.mark.parametrize("kind", ["file", "mapping"])
def test_values_keep_their_type(kind: str, tmp_path: Path) -> None:
    text = dump(small_recipe("a", tmp_path, tmp_path))
    (tmp_path / "a.yaml").write_text(text)
    source = tmp_path / "a.yaml" if kind == "file" else yaml.safe_load(text)
    before = yaml.safe_load(text)
    recipe = Recipe.load(source, **VALUES)
    assert recipe.optimizer.lr == 1e-5
    assert (recipe.name, recipe.seed, recipe.checkpoint.keep_best) == ("123", 5, None)
    assert recipe.adapter.target_modules == ("q_proj", "v_proj")
    assert recipe.training.steps == 7
    assert recipe.model.path == VALUES["model.path"]
    assert kind == "file" or source == before, "the mapping is not changed"


def test_a_shipped_recipe_has_a_name() -> None:
    assert Recipe.load("quickstart").name == "quickstart"


@pytest.mark.parametrize("kind", ["file", "mapping"])
def test_every_mistake_is_told(kind: str, tmp_path: Path) -> None:
    text = dump(small_recipe("a", tmp_path, tmp_path))
    (tmp_path / "a.yaml").write_text(text)
    source = tmp_path / "a.yaml" if kind == "file" else yaml.safe_load(text)
    with pytest.raises(RecipeError) as raised:
        Recipe.load(source, **{"optimizer.lr": "fast", "training.stepz": 3, "seed": -1})
    told = str(raised.value)
    assert "override: training.stepz: unknown key; did you mean 'steps'" in told
    assert "override: optimizer.lr: " in told
    assert "override: seed: " in told
    assert "command line" not in told
