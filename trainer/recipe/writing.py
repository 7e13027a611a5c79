"""The output of a recipe: as YAML to freeze into a run, as differences and a fingerprint, as a JSON Schema."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import cache, reduce
from typing import Any

import yaml

from trainer.recipe.base import KeyPath, MayChange
from trainer.recipe.document import Dumper
from trainer.recipe.optimizers import SCHEDULES
from trainer.recipe.root import Recipe
from trainer.recipe.tree import dotted, field_at, fields_below

LENGTH: tuple[KeyPath, ...] = (("training", "steps"), ("training", "epochs"))
"""The values that may grow between attempts where `length_decides` gives no reason against it."""


@cache
def may_change(path: KeyPath) -> bool:
    """Returns True if the field at the path, or a section that it is in, does not decide the result."""
    fields = (field_at(path[:length]) for length in range(1, len(path) + 1))
    return any(isinstance(mark, MayChange) for field in fields if field for mark in field.metadata)


def changeable() -> list[KeyPath]:
    """Returns the fields and sections that may change between attempts, without the fields of such a section."""
    return [path for path in fields_below(Recipe, ()) if may_change(path) and not may_change(path[:-1])]


def dump(recipe: Recipe) -> str:
    """Returns the recipe with every default filled in, as YAML in the order of the model; `loads` reads it back."""
    return yaml.dump(recipe.model_dump(mode="json"), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)


def differences(frozen: Recipe, new: Recipe) -> list[str]:
    """Returns ``path: old -> new`` for each value that decides the result and is not the same."""
    old, now = dict(_leaves(frozen)), dict(_leaves(new))
    paths = [*old, *(path for path in now if path not in old)]
    return [f"{dotted(p)}: {_show(old, p)} -> {_show(now, p)}" for p in paths if _show(old, p) != _show(now, p)]


def changeable_values(recipe: Recipe) -> dict[str, Any]:
    """Returns what may differ between attempts, the length included, as plain data by dotted path."""
    keys = [path for path in fields_below(Recipe, ()) if may_change(path) or path in LENGTH]
    sections = {path[:-1] for path in keys}
    found: Any = recipe.model_dump(mode="json")
    # A section that is left out has no values.
    values = {path: reduce(lambda value, key: value and value[key], path, found) for path in keys}
    return {dotted(path): value for path, value in values.items() if path not in sections}


def length_decides(recipe: Recipe) -> str:
    """Returns why the result of a step depends on the length of the run, as a clause; empty if it does not."""
    schedule, adapter = recipe.schedule, recipe.adapter
    if SCHEDULES[schedule.name].spans_run:
        return f"the learning rate of schedule {schedule.name} falls over all steps of the run"
    if schedule.warmup_ratio:
        return f"the warm-up takes {schedule.warmup_ratio:g} of all steps of the run (schedule.warmup_ratio)"
    if adapter.row.spans_run:
        return f"adapter.method {adapter.label} has a schedule over all steps of the run"
    return ""


def fingerprint(recipe: Recipe) -> str:
    """Returns a SHA-256 (hex) of the values that decide the result of a step; equal for recipes with the same steps."""
    apart = () if length_decides(recipe) else LENGTH
    leaves = [[path, value] for path, value in _leaves(recipe) if path not in apart]
    return hashlib.sha256(json.dumps(leaves).encode()).hexdigest()


def schema() -> dict[str, Any]:
    """Returns the JSON Schema of a recipe, for editors."""
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "recipe.schema.json"}
    return head | Recipe.model_json_schema()


def _leaves(recipe: Recipe) -> Iterator[tuple[KeyPath, Any]]:
    for path, value in _walk(recipe.model_dump(mode="json"), ()):
        if not may_change(path):
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
