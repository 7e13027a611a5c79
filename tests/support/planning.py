"""Recipes over a folder that holds a ``config.json`` and nothing else: all that a plan needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support.training import small_recipe
from trainer.plan.config import read_base
from trainer.plan.memory import Planner
from trainer.plan.result import Limits, Plan
from trainer.recipe import Recipe

SMALL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 515,
    "hidden_size": 72,
    "intermediate_size": 136,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 18,
    "max_position_embeddings": 512,
}
"""No dimension is a multiple of 7 or 16, so that shards come out uneven."""

EIGHT_LAYERS: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 384,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}

LLAMA_70B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}


def config_folder(folder: Path, /, shape: dict[str, Any] = SMALL, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**shape, **changes}))
    return folder


def plan_recipe(folder: Path, /, shape: dict[str, Any] = SMALL, **changes: Any) -> Recipe:
    """A recipe over a base of this shape; dotted keys change it."""
    return small_recipe("plan", config_folder(folder / "base", shape), folder, **changes)


def planned(recipe: Recipe, ranks: int = 1, limits: Limits | None = None) -> Plan:
    return Planner(read_base(recipe.model).config, limits or Limits()).plan(recipe, ranks)
