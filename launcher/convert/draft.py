"""An unfinished recipe: the settings carried over, those that were not and why, and the obstacles to a valid recipe."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

OFF: tuple[Any, ...] = (None, False, "", [], {}, 0, 0.0, "none", "no")
"""Values that switch a setting off: nothing is lost if the recipe has no such setting."""
UNKNOWN = "no such setting in a recipe"


class Draft:
    """An unfinished recipe and the account of each setting.

    ``take`` reads a setting without an entry in the account. Every setting that is on must be entered in ``used`` (by
    ``put``), ``decided``, ``lost``, ``idle`` or ``hindrances``; ``finish`` enters the others.
    """

    def __init__(
        self, settings: Mapping[str, Any], whole: Draft | None = None, place: str = "", home: str = ""
    ) -> None:
        self.settings = {key: value for key, value in settings.items() if value is not None}
        self.empty = {key for key, value in settings.items() if value is None}
        """Keys without a value, which is not always the same as a missing key."""
        self.home = home
        """For a part: the path in the recipe that its settings decide."""
        self.recipe: dict[str, Any] = whole.recipe if whole else {}
        self.decisions: list[str] = whole.decisions if whole else []
        self.decided: dict[str, str] = whole.decided if whole else {}
        """Keys that a recipe decides in another way, each with that way."""
        self.used: dict[str, str] = whole.used if whole else {}
        """Keys that were carried over, each with the path in the recipe that it decides."""
        self.lost: dict[str, str] = whole.lost if whole else {}
        """Keys that were not carried over and may change the result, each with the reason."""
        self.idle: dict[str, str] = whole.idle if whole else {}
        """Keys without an effect on the result, each with the reason."""
        self.hindrances: dict[str, str] = whole.hindrances if whole else {}
        self.place = place
        """For a part: the prefix of its keys' names, ``datasets[0].``."""

    def part(self, where: str, settings: Mapping[str, Any], home: str = "") -> Draft:
        """Returns a draft of a mapping inside the settings, with keys named ``where.key``; it needs its own finish."""
        return Draft(settings, self, f"{self.place}{where}.", home or self.home)

    def take(self, key: str, default: Any = None) -> Any:
        return self.settings.get(key, default)

    def read(self, key: str, default: Any = None) -> Any:
        """Takes a part's setting, and enters it as used for the part's home."""
        self.use(self.home, key)
        return self.take(key, default)

    def number(self, key: str, default: Any = None) -> Any:
        """Takes a setting that must be a number; anything else is a hindrance, and the default is returned."""
        value = as_number(self.take(key, default))
        if value is None or is_number(value):
            return value
        self.hinder(key, f"{value!r} is no number")
        return as_number(default)

    def is_on(self, key: str) -> bool:
        return self.take(key) not in OFF

    def names(self, key: str) -> list[str]:
        """Takes a list of names, or one text of names with commas; anything else is a hindrance."""
        given = self.take(key, [])
        if isinstance(given, str):
            given = given.split(",")
        if isinstance(given, list) and all(isinstance(name, str) for name in given):
            return [name.strip() for name in given if name.strip()]
        self.hinder(key, f"{given!r} is no list of names")
        return []

    def use(self, path: str, *keys: str) -> None:
        """Enters the keys that the settings have as used for the path."""
        self.used |= {f"{self.place}{key}": path for key in keys if key in self.settings}

    def put(self, path: str, value: Any, *keys: str) -> None:
        """Sets the value at the path. ``keys``: the settings that decide the value."""
        *sections, name = path.split(".")
        place = self.recipe
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
        self.use(path, *keys)

    def move(self, key: str, path: str) -> None:
        """Copies the key's value to the path, if the key has one."""
        value = as_number(self.take(key))
        if value is not None:
            self.put(path, value, key)

    def decide(self, key: str, reason: str) -> None:
        """Enters the setting as decided in another way than the source decides it, if it is on."""
        if self.is_on(key):
            self.decided[f"{self.place}{key}"] = reason

    def lose(self, key: str, reason: str) -> None:
        self.lost[f"{self.place}{key}"] = reason

    def pass_over(self, key: str, reason: str) -> None:
        """Enters the setting as without effect, if it is on."""
        if self.is_on(key):
            self.idle[f"{self.place}{key}"] = reason

    def hinder(self, key: str, reason: str) -> None:
        self.hindrances[f"{self.place}{key}"] = reason

    def hinder_where(self, table: Mapping[str, str]) -> None:
        """Enters the settings of the table that are on as hindrances. ``table``: key to reason."""
        for key, reason in table.items():
            if self.is_on(key):
                self.hinder(key, reason)

    def finish(self, idle: Mapping[str, str]) -> Draft:
        """Enters every other setting that is on: as idle if its name or prefix (``wandb_*``) is in ``idle``, else as
        lost."""
        beginnings = {key[:-1]: reason for key, reason in idle.items() if key.endswith("*")}
        named = {*self.used, *self.decided, *self.lost, *self.idle, *self.hindrances}
        # A key is also named if one of its parts is: `datasets` by `datasets[0].type`.
        named |= {name[: found.start()] for name in named for found in re.finditer(r"[.[]", name)}
        for key in [key for key in self.settings if f"{self.place}{key}" not in named and self.is_on(key)]:
            begun = [reason for beginning, reason in beginnings.items() if key.startswith(beginning)]
            if key in idle or begun:
                self.pass_over(key, idle[key] if key in idle else begun[0])
            else:
                self.lose(key, UNKNOWN)
        return self

    def report(self) -> list[str]:
        return [
            *(f"decided: {text}" for text in self.decisions),
            *(f"decided: {key}: {reason}" for key, reason in self.decided.items()),
            *(f"not carried over: {key}: {reason}" for key, reason in self.lost.items()),
            *(f"no effect: {key}: {reason}" for key, reason in self.idle.items()),
        ]


def as_mapping(value: Any) -> dict[str, Any]:
    """Returns the value if it is a mapping, else an empty mapping."""
    return value if isinstance(value, dict) else {}


def is_number(value: Any) -> bool:
    """Returns true for a finite number that is no boolean."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def as_number(value: Any) -> Any:
    """Converts text to a number (YAML 1.1 reads 2e-5 as text), and whole numbers from 1 up to int; returns other values
    unchanged."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return value
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) >= 1 else value
