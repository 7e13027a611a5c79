"""The runs of a recipe with `adapters`, and what keeps runs apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.training import small_recipe
from trainer.errors import RecipeError
from trainer.recipe.rules.together import RULES, check_together
from trainer.recipe.sweeps.variants import variants

BASE: dict[str, Any] = {
    "name": "tuned",
    "model": {"path": "base"},
    "data": {"train": [{"path": "rows.jsonl", "format": "completion"}]},
    "training": {"steps": 3, "global_batch": 2, "micro_batch": 1},
    "optimizer": {"lr": 1e-4},
    "storage": "runs",
}


def test_each_is_the_recipe_with_its_own_settings() -> None:
    low, other = variants({**BASE, "adapters": {"low": {"optimizer.lr": 1e-5}, "other": {"adapter.method": "rslora"}}})
    assert (low.name, low.optimizer.lr, low.adapter.rank) == ("tuned-low", 1e-5, 16)
    assert (other.name, other.adapter.rank) == ("tuned-other", 64), "defaults follow from the method"
    assert not low.adapters


def test_the_mistakes_of_all_are_reported_with_the_run() -> None:
    with pytest.raises(RecipeError) as found:
        variants({**BASE, "adapters": {"a": {"optimizer.lr": -1}, "b": {"adapter.rnk": 8}}})
    said = str(found.value)
    assert "adapters.a: optimizer.lr" in said
    assert "adapters.b: adapter.rnk" in said


UNFIT: dict[str, dict[str, Any]] = {
    "task": {"task": "grpo", "data.packing": False, "grpo.reward": {"function": "rewards:length"}},
    "adapter.method": {"adapter.method": "pissa"},
    "adapter.bias": {"adapter.bias": "all"},
    "adapter.modules_to_save": {"adapter.modules_to_save": ["lm_head"]},
    "adapter.trainable_tokens": {"adapter.trainable_tokens": [3]},
    "model.quantization": {"model.quantization": "int8", "model.dtype": "bfloat16"},
    "strategy.kind": {"strategy.kind": "zero2"},
    "strategy.context_parallel": {"strategy.kind": "fsdp", "strategy.context_parallel": 2, "resources.workers": 2},
    "compute.compile": {"compute.compile": True},
    "compute.tile_tokens": {"compute.tile_tokens": 256},
    "sft.neftune_alpha": {"sft.neftune_alpha": 5.0},
    "training.router_aux_loss_coef": {"training.router_aux_loss_coef": 0.01},
    "profile.steps": {"profile.steps": [2, 3]},
}


def test_every_rule_has_a_case() -> None:
    assert [rule.path for rule in RULES] == list(UNFIT)


@pytest.mark.parametrize("path", UNFIT)
def test_what_does_not_work_together_is_refused_by_its_key(path: str, tmp_path: Path) -> None:
    plain = small_recipe("plain", Path("base"), tmp_path, **UNFIT[path])
    with pytest.raises(RecipeError) as found:
        check_together([plain.model_copy(update={"name": "another"}), plain])
    assert [mistake.path for mistake in found.value.mistakes] == [path]


def test_what_the_processes_share_is_one(tmp_path: Path) -> None:
    one = small_recipe("one", Path("base"), tmp_path)
    other = small_recipe("one", Path("another"), tmp_path, **{"training.gradient_checkpointing": True})
    with pytest.raises(RecipeError) as found:
        check_together([one, other])
    assert [mistake.path for mistake in found.value.mistakes] == ["model", "training.gradient_checkpointing", "name"]


def test_rows_data_orders_and_optimizers_may_differ(tmp_path: Path) -> None:
    changes = [{"seed": 2}, {"data.sequence_length": 32}, {"optimizer.name": "muon"}, {"training.micro_batch": 3}]
    check_together([small_recipe(f"r{n}", Path("base"), tmp_path, **one) for n, one in enumerate(changes)])
