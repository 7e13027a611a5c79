"""A recipe in the making: what was carried over, what was not and why, what stands in the way."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

OFF: tuple[Any, ...] = (None, False, "", [], {}, 0, 0.0, "none", "no")
"""Values that switch a setting off: nothing is lost where the recipe has no such setting."""
UNHEARD = "no such setting in a recipe"


class Draft:
    """Reading a setting does not settle it: each that is on ends up in ``used`` (by ``put``), ``lost``, ``idle`` or
    ``hindrances``, and ``finish`` puts those into ``lost`` that nobody named."""

    def __init__(
        self, settings: Mapping[str, Any], whole: Draft | None = None, place: str = "", home: str = ""
    ) -> None:
        self.settings = {key: value for key, value in settings.items() if value is not None}
        self.empty = {key for key, value in settings.items() if value is None}
        """Keys that stand there without a value, which is not always the same as being left out."""
        self.home = home
        """Of a part: the path in the recipe that its settings come to."""
        self.recipe: dict[str, Any] = whole.recipe if whole else {}
        self.decisions: list[str] = whole.decisions if whole else []
        self.used: dict[str, str] = whole.used if whole else {}
        """Keys that were carried over, each with a path in the recipe that it decides."""
        self.lost: dict[str, str] = whole.lost if whole else {}
        """Keys whose absence may change what is learned."""
        self.idle: dict[str, str] = whole.idle if whole else {}
        """Keys that have no bearing on the result."""
        self.hindrances: dict[str, str] = whole.hindrances if whole else {}
        self.place = place
        """Of a part: what its keys' names begin with, ``datasets[0].``."""

    def part(self, where: str, settings: Mapping[str, Any], home: str = "") -> Draft:
        """A mapping inside the settings, whose keys are named ``where.key``; ``finish`` it like the whole."""
        return Draft(settings, self, f"{self.place}{where}.", home or self.home)

    def take(self, key: str, default: Any = None) -> Any:
        return self.settings.get(key, default)

    def read(self, key: str, default: Any = None) -> Any:
        """``take`` of a part's setting that comes to the part's home."""
        self.use(self.home, key)
        return self.take(key, default)

    def number(self, key: str, default: Any = None) -> Any:
        """A setting that has to be a number, or else stands in the way."""
        value = as_number(self.take(key, default))
        if value is None or is_number(value):
            return value
        self.hinder(key, f"{value!r} is no number")
        return as_number(default)

    def is_on(self, key: str) -> bool:
        return self.take(key) not in OFF

    def names(self, key: str) -> list[str]:
        """A list of names, which may stand as one text with commas."""
        given = self.take(key, [])
        if isinstance(given, str):
            given = given.split(",")
        if isinstance(given, list) and all(isinstance(name, str) for name in given):
            return [name.strip() for name in given if name.strip()]
        self.hinder(key, f"{given!r} is no list of names")
        return []

    def use(self, path: str, *keys: str) -> None:
        """The keys, those of them that are there, decide what stands at the path."""
        self.used |= {f"{self.place}{key}": path for key in keys if key in self.settings}

    def put(self, path: str, value: Any, *keys: str) -> None:
        """``keys``: what the value comes from."""
        *sections, name = path.split(".")
        place = self.recipe
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
        self.use(path, *keys)

    def move(self, key: str, path: str) -> None:
        """The value as it is, where there is one."""
        value = as_number(self.take(key))
        if value is not None:
            self.put(path, value, key)

    def lose(self, key: str, reason: str) -> None:
        self.lost[f"{self.place}{key}"] = reason

    def pass_over(self, key: str, reason: str) -> None:
        """Where the setting is on."""
        if self.is_on(key):
            self.idle[f"{self.place}{key}"] = reason

    def hinder(self, key: str, reason: str) -> None:
        self.hindrances[f"{self.place}{key}"] = reason

    def hinder_where(self, table: Mapping[str, str]) -> None:
        """The settings of the table that are switched on stand in the way."""
        for key, reason in table.items():
            if self.is_on(key):
                self.hinder(key, reason)

    def finish(self, idle: Mapping[str, str]) -> Draft:
        """Sorts what nobody named: without bearing (by name, or by beginning: ``wandb_*``), off, or lost."""
        beginnings = {key[:-1]: reason for key, reason in idle.items() if key.endswith("*")}
        named = {*self.used, *self.lost, *self.idle, *self.hindrances}
        named |= {name[: found.start()] for name in named for found in re.finditer(r"[.[]", name)}  # a part of it was
        for key in [key for key in self.settings if f"{self.place}{key}" not in named and self.is_on(key)]:
            begun = [reason for beginning, reason in beginnings.items() if key.startswith(beginning)]
            if key in idle or begun:
                self.pass_over(key, idle[key] if key in idle else begun[0])
            else:
                self.lose(key, UNHEARD)
        return self

    def report(self) -> list[str]:
        return [
            *(f"decided: {text}" for text in self.decisions),
            *(f"not carried over: {key}: {reason}" for key, reason in self.lost.items()),
            *(f"without bearing: {key}: {reason}" for key, reason in self.idle.items()),
        ]


def as_mapping(value: Any) -> dict[str, Any]:
    """The value where it is a mapping, else an empty one."""
    return value if isinstance(value, dict) else {}


def is_number(value: Any) -> bool:
    """Whether one can reckon with it."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def as_number(value: Any) -> Any:
    """A number that was written as text, as YAML 1.1 reads 2e-5; whole where it can be."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return value
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) >= 1 else value
