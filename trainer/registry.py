"""Registries: tables of the names that a recipe may give, each with its row.

A choice is one file plus one row. Rows contain what must be known of a choice without importing its code, so that a
recipe is checked without the code that it names; `Registry.load` imports on first use.

A table with a ``group`` also takes rows of plug-ins: what installed packages offer as entry points of that group, a row
that a recipe names as ``package.module:ROW``, and what an imported module adds (`Registry.add`). A plug-in's row is
imported by `Registry.use` only, which is called for the names in a user's recipe (`trainer.recipe.plugins`). Processes
that this one starts import the same rows: they are listed in the environment.
"""

from __future__ import annotations

import difflib
import importlib
import logging
import os
import re
import sys
from collections.abc import Callable, ItemsView, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, TypeVar

from trainer.errors import InputError, UsageError

log = logging.getLogger(__name__)

CODE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
"""``module:Attribute``: code that a recipe names."""
IMPORTED = "MUSTER_PLUGINS"
"""The variable that lists the plug-ins that this process has imported, because its user's recipe names them: modules,
and rows as ``muster.tasks=name``. The processes that it starts import them too."""


def choose_hint(name: str, names: tuple[str, ...]) -> str:
    """Returns ``; did you mean 'lora'?`` when one of the names is close to the given one, else an empty text."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def close_names(name: str, names: Iterable[str]) -> list[str]:
    """Returns the names that are close to the given one, the closest first."""
    return difflib.get_close_matches(name, list(names), n=3, cutoff=0.6)


@dataclass(frozen=True)
class Choice:
    """A row. ``code``: what the name selects, as ``module:attribute``. ``example``: settings of a recipe, by dotted
    path, that the contract tests of a plug-in need (`launcher.testing`)."""

    code: str
    example: Mapping[str, Any] = field(default_factory=dict, kw_only=True, hash=False)


Row = TypeVar("Row", bound=Choice)


class Registry(Generic[Row]):
    """The rows of one kind of choice, by name."""

    def __init__(
        self,
        kind: str,
        rows: Mapping[str, Row],
        also: Mapping[str, str] = MappingProxyType({}),
        *,
        group: str = "",
        held: Row | None = None,
    ) -> None:
        """``also``: further names, by which other tools know a row, and the row's own. ``group``: the entry points of
        plug-ins. ``held``: the row of a plug-in that is not imported; its class is that of every row."""
        self.kind, self.also, self.group = kind, also, group
        self._rows, self._plugged = dict(rows), dict[str, Row]()
        self._held = held
        self.on_add: Callable[[str, Row], None] = lambda name, row: None

    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.items())

    def items(self) -> ItemsView[str, Row]:
        """Returns the rows of muster, and those of plug-ins that are imported."""
        return {**self._rows, **{n: row for n, row in self._plugged.items() if row is not self._held}}.items()

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.get(name) is not None

    def __getitem__(self, name: str) -> Row:
        """Returns the row of ``name``; raises UsageError with the known names."""
        if (row := self.get(name)) is not None:
            return row
        names = (*self.names(), *(offered for offered in self.offered() if offered not in self._plugged))
        if not names:
            raise UsageError(f"{name!r} is not a {self.kind}: there is none to choose yet, leave it out")
        raise UsageError(f"{self.kind} {name!r} is not one of: {', '.join(names)}{choose_hint(name, names)}")

    def get(self, name: str) -> Row | None:
        row = self._rows.get(name) or self._plugged.get(name)
        if row is None and self.group and IMPORTED in os.environ:
            self._inherit(name, os.environ[IMPORTED].split())
            row = self._plugged.get(name)
        return row

    def _inherit(self, name: str, imported: Iterable[str]) -> None:
        """Imports the row that the process which started this one has imported."""
        for module in (token for token in imported if "=" not in token):
            import_module(module)
        if f"{self.group}={name}" in imported:
            self.use(name)
            if name not in self._plugged:
                raise InputError(f"the {self.kind} {name!r} is that of a plug-in that is not installed on this host")

    def load(self, name: str) -> Any:
        """Imports the object that ``name`` selects; raises UsageError for a name that is not in the table."""
        if (row := self[name]) is self._held:
            raise UsageError(
                f"{self.kind} {name!r} is that of a plug-in, and a stored run named it: it was not imported; give the "
                "recipe file that names it"
            )
        module, attribute = row.code.split(":")
        return getattr(importlib.import_module(module), attribute)

    def is_own(self, name: str) -> bool:
        """Returns True for a name of muster's own."""
        return name in self._rows or name in self.also

    def is_held(self, name: str) -> bool:
        """Returns True for the name of a plug-in that is not imported."""
        return name in self._plugged and self._plugged[name] is self._held

    def offered(self) -> dict[str, EntryPoint]:
        """Returns what installed packages offer, by name, without importing it. A name of muster's own stays its own,
        with a warning."""
        found: dict[str, EntryPoint] = {}
        for point in entry_points(group=self.group) if self.group else ():
            if self.is_own(point.name):
                text = "%s offers the %s %r, which is muster's own and stays it; rename the entry point of %s"
                log.warning(text, provider(point), self.kind, point.name, self.group)
            else:
                found.setdefault(point.name, point)
        return found

    def use(self, name: str) -> None:
        """Imports the row of a plug-in that the user's recipe names. No effect on other names, unknown ones too. Raises
        UsageError if that fails."""
        if self._held is None or self.is_own(name) or self._plugged.get(name, self._held) is not self._held:
            return
        point = self.offered().get(name)
        if point is None and not CODE.fullmatch(name):
            return
        if len(points := tuple(entry_points(group=self.group, name=name))) > 1:
            raise UsageError(
                f"{' and '.join(sorted(map(provider, points)))} offer the {self.kind} {name!r}; uninstall all but one, "
                f"or write {points[0].value} for the row itself"
            )
        where = point.value if point else name
        module, _, attribute = where.partition(":")
        by = f" (of {provider(point)})" if point else ""
        row: Any = getattr(import_module(module, by), attribute, None)
        if not isinstance(row, type(self._held)):
            got = f"has no {attribute!r}" if row is None else f"{attribute} is {type(row).__name__}"
            raise InputError(f"{where}{by} is no row of a {self.kind}: {module} {got}, not {type(self._held).__name__}")
        self.add(name, row)
        _note(f"{self.group}={name}")

    def add(self, name: str, row: Row) -> None:
        """Adds a plug-in's row. Raises UsageError for a name that is taken."""
        if self.is_own(name):
            raise UsageError(f"{name!r} is a {self.kind} of muster; give the plug-in's another name")
        if self._plugged.get(name, self._held) not in (self._held, row):
            raise UsageError(f"two plug-ins have a {self.kind} {name!r}; leave one of them out")
        self.on_add(name, row)
        self._plugged[name] = row

    def hold(self, name: str) -> None:
        """Gives the name of a plug-in that may not be imported a row with no facts, so that a stored recipe is read."""
        assert self._held is not None
        if not self.is_own(name):
            self._plugged.setdefault(name, self._held)


def is_module(name: str) -> bool:
    """Returns True for what can be the name of a Python module."""
    return all(part.isidentifier() for part in name.split("."))


def key_of(name: str) -> str:
    """Returns the key in a recipe of the settings of a name: the name itself, or that of ``package.module:KEY``."""
    return name.rpartition(":")[2].lower()


def provider(point: EntryPoint) -> str:
    """Returns the name and version of the package that offers an entry point."""
    return f"{point.dist.name} {point.dist.version}" if point.dist else point.value


def import_module(name: str, by: str = "") -> Any:
    """Imports a module of a plug-in, from what is installed or from the working folder. Raises InputError."""
    look_in_working_folder()
    try:
        return importlib.import_module(name)
    except Exception as error:  # the module's own code may raise anything
        said = f"{type(error).__name__}: {error}"
        raise InputError(f"the plug-in {name}{by} cannot be imported from {Path.cwd()}: {said}") from error


def look_in_working_folder() -> None:
    """Lets imports find modules in the working folder too, for good: a plug-in's classes are pickled by their names."""
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)


def import_plugin(name: str) -> None:
    """Imports a module that the user's recipe lists, which may add rows. Raises InputError."""
    import_module(name)
    _note(name)


def _note(imported: str) -> None:
    given = os.environ.get(IMPORTED, "").split()
    os.environ[IMPORTED] = " ".join(dict.fromkeys([*given, imported]))


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
