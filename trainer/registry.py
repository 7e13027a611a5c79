"""Registries: tables of the names that a recipe may give, each with its row.

A choice is one file plus one row. Rows contain what must be known of a choice without importing its code, so that a
recipe is checked without the code that it names; `Registry.load` imports on first use.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import ItemsView, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, TypeVar

from trainer.errors import InputError, UsageError


def choose_hint(name: str, names: tuple[str, ...]) -> str:
    """Returns ``; did you mean 'lora'?`` when one of the names is close to the given one, else an empty text."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def close_names(name: str, names: Iterable[str]) -> list[str]:
    """Returns the names that are close to the given one, the closest first."""
    return difflib.get_close_matches(name, list(names), n=3, cutoff=0.6)


@dataclass(frozen=True)
class Choice:
    """A row. ``code``: what the name selects, as ``module:attribute``."""

    code: str


Row = TypeVar("Row", bound=Choice)


class Registry(Generic[Row]):
    """The rows of one kind of choice, by name."""

    def __init__(self, kind: str, rows: Mapping[str, Row], also: Mapping[str, str] = MappingProxyType({})) -> None:
        """``also``: further names, by which other tools know a row, and the row's own."""
        self.kind, self.also = kind, also
        self._rows = dict(rows)

    def names(self) -> tuple[str, ...]:
        return tuple(self._rows)

    def items(self) -> ItemsView[str, Row]:
        return self._rows.items()

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    def __getitem__(self, name: str) -> Row:
        """Returns the row of ``name``; raises UsageError with the known names."""
        if name in self._rows:
            return self._rows[name]
        if not self._rows:
            raise UsageError(f"{name!r} is not a {self.kind}: there is none to choose yet, leave it out")
        names = ", ".join(self._rows)
        raise UsageError(f"{self.kind} {name!r} is not one of: {names}{choose_hint(name, self.names())}")

    def get(self, name: str) -> Row | None:
        return self._rows.get(name)

    def load(self, name: str) -> Any:
        """Imports the object that ``name`` selects; raises UsageError for a name that is not in the table."""
        module, attribute = self[name].code.split(":")
        return getattr(importlib.import_module(module), attribute)


def load_code(key: str, spec: str) -> Any:
    """Imports ``module:attribute``, which a user's recipe names under ``key``, from the working folder or from what is
    installed. Raises InputError if that fails."""
    place, _, name = spec.rpartition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(place)
    except Exception as error:  # the module's own code may raise anything
        said = f"{type(error).__name__}: {error}"
        raise InputError(f"{key} {spec!r} cannot be imported from {Path.cwd()}: {said}") from error
    finally:
        sys.path.remove(str(Path.cwd()))
    if not hasattr(module, name):
        raise InputError(f"{key} {spec!r}: {place} has no {name!r}")
    return getattr(module, name)
