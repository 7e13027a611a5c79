"""Plug-ins: the names in a recipe that are not muster's own, and the modules that it lists.

Code is imported here only, and only for a recipe that the user has given (``imports``). A stored recipe keeps its
plug-ins' names; in a process whose user has not named the same plug-ins, their rows have no facts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from importlib.metadata import packages_distributions, version
from typing import Any, NamedTuple

from pydantic.fields import FieldInfo

from trainer.errors import UsageError
from trainer.recipe.base import MAY_CHANGE, KeyPath, Section
from trainer.recipe.formats import FORMATS
from trainer.recipe.methods import METHODS
from trainer.recipe.optimizers import OPTIMIZERS, SCHEDULES
from trainer.recipe.root import Recipe
from trainer.recipe.strategies import STRATEGIES
from trainer.recipe.tasks import TASKS
from trainer.recipe.trackers import TRACKERS
from trainer.registry import Registry, import_plugin, is_module, key_of, provider

TABLES: dict[tuple[str, ...], Registry[Any]] = {
    ("task",): TASKS,
    ("adapter", "method"): METHODS,
    ("data", "train", "*", "format"): FORMATS,
    ("data", "eval", "*", "format"): FORMATS,
    ("optimizer", "name"): OPTIMIZERS,
    ("schedule", "name"): SCHEDULES,
    ("strategy", "kind"): STRATEGIES,
    ("tracking", "*"): TRACKERS,
}
"""The tables that plug-ins add rows to, by the places in a recipe that name a row."""


class Named(NamedTuple):
    """A name of a plug-in's row in a recipe."""

    path: KeyPath
    table: Registry[Any]
    name: str


def named(data: Any) -> Iterator[Named]:
    """Yields the names in a recipe's plain data that are not those of muster's own rows, unknown ones too."""
    for pattern, table in TABLES.items():
        for path, name in _at(data, pattern, ()):
            # `optimizer.name: module:Attribute` is the optimizer itself, not a row.
            if isinstance(name, str) and not table.is_own(name) and (table is not OPTIMIZERS or ":" not in name):
                yield Named(path, table, name)


def _at(value: Any, pattern: tuple[str, ...], path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    if not pattern:
        yield path, value
    elif pattern[0] == "*" and isinstance(value, list):
        for index, item in enumerate(value):
            yield from _at(item, pattern[1:], (*path, index))
    elif isinstance(value, dict) and pattern[0] in value:
        yield from _at(value[pattern[0]], pattern[1:], (*path, pattern[0]))


def use(data: dict[str, Any], *, imports: bool, known: Collection[str] = ()) -> list[tuple[KeyPath, str]]:
    """Imports what the recipe names, if the user ``imports`` it, and gives the names of all other plug-ins rows without
    facts. ``known``: names that were those of plug-ins when the recipe was stored. Returns a mistake for each plug-in
    that cannot be imported."""
    mistakes: list[tuple[KeyPath, str]] = []
    for path, module in _at(data, ("plugins", "*"), ()) if imports else ():
        if isinstance(module, str) and is_module(module):
            try:
                import_plugin(module)
            except UsageError as error:
                mistakes.append((path, error.cause))
    for path, table, name in named(data):
        try:
            if imports:
                table.use(name)
        except UsageError as error:
            mistakes.append((path, error.cause))
        if name in table:
            continue
        # After a mistake, the name may be that of a plug-in that was not imported: one sentence is enough.
        if mistakes or (not imports and (":" in name or name in known or name in table.offered())):
            table.hold(name)
    return mistakes


def drop_held(data: dict[str, Any]) -> set[KeyPath]:
    """Removes the settings of plug-ins that are not imported, which nothing here can check. Returns the paths of their
    names."""
    held = [found for found in named(data) if found.table.is_held(found.name)]
    for key in {key_of(name) for _, _, name in held} - Recipe.model_fields.keys():
        data.pop(key, None)
    return {found.path for found in held}


def use_installed() -> None:
    """Imports every row that installed packages offer. Raises UsageError if that fails."""
    for table in TABLES.values():
        for name in table.offered():
            table.use(name)


def plugins_of(recipe: Recipe) -> list[tuple[str, str]]:
    """Returns the plug-ins that a recipe names, each with its key: rows, then modules."""
    rows = [(".".join(map(str, path)), name) for path, _, name in named(recipe.model_dump(mode="json"))]
    return [*rows, *(("plugins", module) for module in recipe.plugins)]


def providers(recipe: Recipe) -> list[dict[str, str]]:
    """Returns the plug-ins that a recipe names, each with the package that it is from and its version; "" for one in
    the working folder."""
    if not (found := plugins_of(recipe)):
        return []
    packages = {name: provider(point) for table in TABLES.values() for name, point in table.offered().items()}
    return [
        {"key": key, "name": name, "package": packages.get(name) or _package_of(name.partition(":")[0])}
        for key, name in found
    ]


def _package_of(module: str) -> str:
    """Returns the name and version of the package that a module is from; empty for one in the working folder."""
    top = module.partition(".")[0]
    return ", ".join(f"{name} {version(name)}" for name in packages_distributions().get(top, []))


def _add_section(name: str, section: type[Section] | None, *metadata: object) -> None:
    """Adds a plug-in's settings to the recipe's model, as a section with the key of the row's name."""
    key = key_of(name)
    if section is None:
        return
    if key in Recipe.model_fields:
        raise UsageError(f"the settings of {name!r} have the key {key!r} in a recipe, which is taken; rename the row")
    field = FieldInfo(annotation=section, default=section())
    field.metadata.extend(metadata)
    Recipe.__pydantic_fields__[key] = field
    Recipe.model_rebuild(force=True)


TASKS.on_add = lambda name, row: _add_section(name, row.section)
TRACKERS.on_add = lambda name, row: _add_section(name, row.section, MAY_CHANGE)
