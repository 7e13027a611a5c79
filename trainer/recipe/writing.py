"""The output of a recipe: as YAML to freeze into a run, as differences and a fingerprint, as a JSON Schema."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import yaml

from trainer.recipe.base import KeyPath
from trainer.recipe.document import Dumper
from trainer.recipe.root import Recipe
from trainer.recipe.trackers import TRACKERS
from trainer.recipe.tree import dotted

MAY_CHANGE: tuple[KeyPath, ...] = (
    ("name",),
    ("storage",),
    ("resources",),
    ("cluster",),
    ("strategy",),
    ("compute",),
    ("checkpoint",),
    ("tracking",),
    *((tracker,) for tracker in TRACKERS.names()),
    ("samples",),
    ("profile",),
    ("training", "stop_after"),
    ("data", "cache_bytes"),
)
"""The values that may differ between the attempts of a run. Name and storage locate the run and do not change its
result."""


def dump(recipe: Recipe) -> str:
    """Returns the recipe with every default filled in, as YAML in the order of the model; `loads` reads it back."""
    return yaml.dump(recipe.model_dump(mode="json"), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)


def differences(frozen: Recipe, new: Recipe) -> list[str]:
    """Returns ``path: old -> new`` for each value that decides the result and is not the same."""
    old, now = dict(_leaves(frozen)), dict(_leaves(new))
    paths = [*old, *(path for path in now if path not in old)]
    return [f"{dotted(p)}: {_show(old, p)} -> {_show(now, p)}" for p in paths if _show(old, p) != _show(now, p)]


def fingerprint(recipe: Recipe) -> str:
    """Returns a SHA-256 (hex) of the values that decide the result; equal for recipes with the same result."""
    return hashlib.sha256(json.dumps([list(leaf) for leaf in _leaves(recipe)]).encode()).hexdigest()


def schema() -> dict[str, Any]:
    """Returns the JSON Schema of a recipe, for editors."""
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "recipe.schema.json"}
    return head | Recipe.model_json_schema()


def _leaves(recipe: Recipe) -> Iterator[tuple[KeyPath, Any]]:
    for path, value in _walk(recipe.model_dump(mode="json"), ()):
        if not any(path[: len(free)] == free for free in MAY_CHANGE):
            yield path, value


def _walk(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield from _walk(child, (*path, key))
    if not isinstance(value, dict | list) or not value:
        yield path, value


def _show(leaves: dict[KeyPath, Any], path: KeyPath) -> str:
    if path not in leaves:
        return "(not there)"
    return yaml.dump(leaves[path], Dumper=Dumper, allow_unicode=True, width=10**6).removesuffix("...\n").strip()
