"""In what runs differ: pure functions of their frozen recipes and their metrics, for `muster ls` and the report.

A setting is named by its dotted key in the recipe. A recipe is frozen with every default filled in; one that an older
version froze has no keys that came later, and counts as if it had their defaults.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from launcher.monitor.status import PARALLEL_RUNS, Status
from trainer.errors import UsageError
from trainer.parsing import Malformed, parse_yaml
from trainer.registry import choose_hint
from trainer.run import layout
from trainer.storage import Storage, in_parallel

Settings = Mapping[str, Any]
"""The values of a recipe by dotted key, in the recipe's order."""

LOCATE = ("name", "storage")
"""Settings that say where a run is: they differ between any two runs."""
FIELDS = ("state", "step", "total_steps", "attempts", "world_size", "samples", "epoch", "job", "holder", "uri")
"""Fields of `Status` that can be a column."""


class ListedRun(NamedTuple):
    status: Status
    settings: Settings


def read_settings(run: Storage) -> dict[str, Any]:
    """Reads a run's settings; there are none before its recipe is frozen, or if it cannot be read."""
    try:
        return settings_of(run.read(layout.RECIPE).decode(errors="replace"))
    except FileNotFoundError:
        return {}


def with_settings(storage: Storage, found: Sequence[Status]) -> list[ListedRun]:
    runs = [storage.child(status.name) for status in found]
    return [ListedRun(*one) for one in zip(found, in_parallel(read_settings, runs, PARALLEL_RUNS), strict=True)]


def settings_of(recipe: str) -> dict[str, Any]:
    try:
        return dict(_leaves(parse_yaml(recipe), ""))
    except Malformed:
        return {}


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """A list is one value, unless it has mappings in it: the sources of the data."""
    of_mappings = isinstance(value, list) and any(isinstance(entry, dict) for entry in value)
    items = value.items() if isinstance(value, dict) else enumerate(value) if of_mappings else ()
    for name, child in items:
        yield from _leaves(child, f"{key}.{name}" if key else str(name))
    if key and not items:
        yield key, value


def differing(recipes: Sequence[Settings]) -> list[str]:
    """Returns the keys of the settings that are not the same in all recipes; a recipe without settings is left out."""
    known = [recipe for recipe in recipes if recipe]
    keys = dict.fromkeys(key for recipe in known for key in recipe)
    return [
        key
        for key in keys
        if key not in LOCATE and len({repr(r[key] if key in r else _default(key)) for r in known}) > 1
    ]


@cache
def _default(key: str) -> Any:
    """Returns a field's default as a frozen recipe has it; None for a field that has none, and for no field."""
    from trainer.recipe.tree import field_at  # half a second, which recipes of one version do not need

    field = field_at(tuple(int(part) if part.isdecimal() else part for part in key.split(".")))
    default = None if field is None or field.is_required() else field.get_default(call_default_factory=True)
    return list(default) if isinstance(default, tuple) else default


def short_name(key: str, recipes: Sequence[Settings]) -> str:
    """Returns the shortest end of a key that names no other setting: ``lr`` for ``optimizer.lr``."""
    parts = key.split(".")
    ends = [".".join(parts[at:]) for at in reversed(range(len(parts)))]
    return next(end for end in ends if end == key or _named(end, recipes) == [key])


def values_of(name: str, runs: Sequence[ListedRun]) -> list[Any]:
    """Returns the value of each run for a name: a field of the status, a setting by its key or the end of it, or a
    metric. A metric comes before several settings of its name (``loss``). Raises UsageError for a name of nothing, or
    of several settings of which not exactly one differs."""
    if name in FIELDS:
        return [getattr(run.status, name) for run in runs]
    recipes = [run.settings for run in runs]
    keys, metrics = _named(name, recipes), dict.fromkeys(metric for run in runs for metric in run.status.metrics)
    if len(keys) > 1 and name in metrics:
        keys = []
    if len(keys) > 1:
        keys = [key for key in keys if key in differing(recipes)] or keys
    if len(keys) > 1:
        raise UsageError(f"{name} names several settings; write one of {', '.join(keys)}")
    if keys:
        return [recipe.get(keys[0]) for recipe in recipes]
    if name not in metrics:
        known = [*FIELDS, *metrics, *dict.fromkeys(key for recipe in recipes for key in recipe)]
        raise UsageError(
            f"{name} is no setting and no metric of these runs{choose_hint(name, tuple(known))}; a setting is "
            f"named as in the recipe (optimizer.lr), and the metrics are {', '.join(metrics) or 'not there yet'}"
        )
    return [run.status.metrics.get(name) for run in runs]


def _named(name: str, recipes: Sequence[Settings]) -> list[str]:
    keys = dict.fromkeys(key for recipe in recipes for key in recipe if key == name or key.endswith(f".{name}"))
    return [name] if name in keys else list(keys)


def ordered(runs: Sequence[ListedRun], name: str) -> list[ListedRun]:
    """Returns the runs by a value, lowest first; with ``-`` before the name, highest first. Runs that have no such
    value come last."""
    values = values_of(name.removeprefix("-"), runs)
    known = [(value, run) for value, run in zip(values, runs, strict=True) if value is not None]
    numbers = all(isinstance(value, int | float) for value, _ in known)
    known.sort(key=lambda one: one[0] if numbers else str(one[0]), reverse=name.startswith("-"))
    return [run for _, run in known] + [run for value, run in zip(values, runs, strict=True) if value is None]


def by_loss(runs: Sequence[Status]) -> list[int]:
    """Returns the places of the runs, best first: by the last evaluation loss if all have one, else by the loss."""
    name = "eval_loss" if all("eval_loss" in run.metrics for run in runs) else "loss"
    losses = [run.metrics.get(name) for run in runs]
    places = {at: loss for at, loss in enumerate(losses) if isinstance(loss, int | float)}
    return sorted(range(len(runs)), key=lambda at: places.get(at, math.inf))


def cell(value: Any) -> str:
    """Returns a value for a person; ``-`` for none."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}".replace("e-0", "e-")
    if isinstance(value, list | tuple):
        return ", ".join(map(cell, value)) or "-"
    if isinstance(value, bool):
        return str(value).lower()  # as in a recipe
    return f"{value:,}" if isinstance(value, int) else str(value)
