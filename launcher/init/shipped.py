"""The shipped recipes in a list: those for chats on one GPU first."""

from __future__ import annotations

import re
from pathlib import Path

from trainer.recipe import Recipe, load

FIRST = "quickstart"
SHORT = {"sft": "texts", "classification": "labels"}
HEAD = ("name", "learns", "method", "GPUs", "base model")


def listed(recipes: dict[str, Path]) -> list[tuple[str, ...]]:
    """Returns a row as in HEAD for each recipe, the ones to begin with first."""
    loaded = {name: load(path) for name, path in recipes.items()}
    return [HEAD, *(_row(name, loaded[name]) for name in sorted(loaded, key=lambda name: _rank(name, loaded[name])))]


def _rank(name: str, recipe: Recipe) -> tuple[object, ...]:
    size = re.search(r"(\d+(?:[._]\d+)?)[bB](?![a-z])", recipe.model.path)
    chats = recipe.task == "sft" and recipe.data.has_chats
    gpus = recipe.resources.min_workers * recipe.resources.gpus_per_worker
    return (name != FIRST, not chats, gpus, float(size[1].replace("_", ".")) if size else 1e9, name)


def _row(name: str, recipe: Recipe) -> tuple[str, ...]:
    quantization = "" if recipe.model.quantization == "none" else f" {recipe.model.quantization}"
    method = "full" if recipe.adapter.kind == "none" else recipe.adapter.label
    gpus = recipe.resources.min_workers * recipe.resources.gpus_per_worker
    kind = "chats" if recipe.task == "sft" and recipe.data.has_chats else SHORT.get(recipe.task, recipe.task)
    base = recipe.model.path.rpartition("/")[2] if name != FIRST else "a small Llama"
    return name, kind, method + quantization, str(gpus or "none"), re.sub(r"-(Instruct|it|\d{4})(?=-|$)", "", base)
