"""A recipe in the making: what was taken from the settings, what was not and why, what stands in the way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OFF: tuple[Any, ...] = (None, False, "", [], {}, 0, 0.0, "none", "no")
"""Values that switch a setting off: nothing is lost where the recipe has no such setting."""


class Draft:
    """``take`` reads a setting and counts it as seen; ``finish`` names those that nobody took."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = {key: value for key, value in settings.items() if value is not None}
        self.recipe: dict[str, Any] = {}
        self.decisions: list[str] = []
        self.lost: dict[str, str] = {}
        """Keys whose absence may change what is learned."""
        self.idle: dict[str, str] = {}
        """Keys that have no bearing on the result."""
        self.hindrances: dict[str, str] = {}
        self._taken: set[str] = set()

    def take(self, key: str, default: Any = None) -> Any:
        self._taken.add(key)
        return self.settings.get(key, default)

    def number(self, key: str, default: Any = None) -> Any:
        """A setting that has to be a number, or else stands in the way."""
        value = as_number(self.take(key, default))
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
            return value
        self.hinder(key, f"{value!r} is no number")
        return as_number(default)

    def any_on(self, *keys: str) -> bool:
        """Whether one of the settings is switched on; all of them count as seen."""
        return bool([key for key in keys if self.take(key) not in OFF])

    def names(self, key: str) -> list[str]:
        """A list of names, which may stand as one text with commas."""
        given = self.take(key, [])
        if isinstance(given, str):
            given = given.split(",")
        if isinstance(given, list) and all(isinstance(name, str) for name in given):
            return [name.strip() for name in given if name.strip()]
        self.hinder(key, f"{given!r} is no list of names")
        return []

    def put(self, path: str, value: Any) -> None:
        *sections, name = path.split(".")
        place = self.recipe
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value

    def move(self, key: str, path: str) -> None:
        """The value as it is, where there is one."""
        value = as_number(self.take(key))
        if value is not None:
            self.put(path, value)

    def lose(self, key: str, reason: str) -> None:
        self._taken.add(key)
        self.lost[key] = reason

    def pass_over(self, key: str, reason: str) -> None:
        self._taken.add(key)
        self.idle[key] = reason

    def hinder(self, key: str, reason: str) -> None:
        self._taken.add(key)
        self.hindrances[key] = reason

    def hinder_where(self, table: Mapping[str, str]) -> None:
        """The settings of the table that are switched on stand in the way."""
        for key, reason in table.items():
            if self.take(key) not in OFF:
                self.hinder(key, reason)

    def finish(self, idle: Mapping[str, str]) -> Draft:
        """Sorts what is left: known to be without bearing (by name, or by beginning: ``wandb_*``), off, or lost."""
        beginnings = {key[:-1]: reason for key, reason in idle.items() if key.endswith("*")}
        for key in [key for key in self.settings if key not in self._taken]:
            begun = [reason for beginning, reason in beginnings.items() if key.startswith(beginning)]
            if key in idle or begun:
                self.idle[key] = idle[key] if key in idle else begun[0]
            elif self.settings[key] not in OFF:
                self.lost[key] = "no such setting in a recipe"
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


def as_number(value: Any) -> Any:
    """A number that was written as text, as YAML 1.1 reads 2e-5; whole where it can be."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return value
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) >= 1 else value
