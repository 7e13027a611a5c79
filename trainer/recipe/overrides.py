"""Overrides ``KEY=VALUE`` on the command line: dotted paths into the recipe, with the type of the field."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from trainer.parsing import is_unicode
from trainer.recipe.base import KeyPath, credentials_refused
from trainer.recipe.document import read_value
from trainer.recipe.sentences import unknown_key
from trainer.recipe.tree import annotation_at, dotted, kinds, section_of


class Applied(NamedTuple):
    """The paths that were set, and a mistake for each override that was not."""

    paths: list[KeyPath]
    mistakes: list[tuple[KeyPath, str]]


def expand(data: Any, path: KeyPath = ()) -> None:
    """Replaces each text that stands for a section (``model: Qwen/Qwen3-8B``) with the section, at any depth."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        if isinstance(value, str):
            if field := _shorthand((*path, key)):
                data[key] = {field: value}
        elif isinstance(value, dict | list):
            expand(value, (*path, key))


def _shorthand(path: KeyPath) -> str | None:
    section = section_of(annotation_at(path))
    return section.shorthand if section else None


def apply(data: dict[str, Any], overrides: Sequence[str]) -> Applied:
    """Sets each ``KEY=VALUE`` in ``data``; later ones win. Validates the keys and refuses credentials, no more."""
    paths: list[KeyPath] = []
    mistakes: list[tuple[KeyPath, str]] = []
    for override in overrides:
        key, separator, text = override.partition("=")
        path = path_of(key)
        on = read_value(text.strip()) not in (False, None)
        wrong = wrong_key(path, on) if separator else f"{override!r:.80} is not KEY=VALUE, such as optimizer.lr=1e-4"
        if not is_unicode(override):
            wrong, path = f"{override!r:.80} is not text in UTF-8", ()
        wrong = wrong or credentials_refused(text) or ""
        value = typed(text.strip(), annotation_at(path))
        if isinstance(value, str) and (field := _shorthand(path)):
            path = (*path, field)
        wrong = wrong or _set(data, path, value)
        if wrong:
            mistakes.append((path if separator else (), wrong))
        else:
            paths.append(path)
    return Applied(paths, mistakes)


def typed(text: str, annotation: Any) -> Any:
    """Returns a text as a value of the field's type: ``123`` is text for a name and a number for a count."""
    value, takes = read_value(text), kinds(annotation)
    quoted = re.match(r"['\"]", text) is not None
    if str not in takes or (isinstance(value, str) and quoted):
        return value
    if isinstance(value, str) or type(value) not in takes:
        return text if value is not None or type(None) not in takes else None
    return value


def path_of(key: str) -> KeyPath:
    """Returns the path of a dotted key; a number is the index of an entry in a list."""
    return tuple(int(part) if part.isdecimal() and len(part) < 10 else part for part in key.strip().split("."))


def wrong_key(path: KeyPath, on: bool = True) -> str:
    """Returns the reason why a path names no value of a recipe; empty if it names one. ``on``: see `unknown_key`."""
    for length in range(1, len(path) + 1):
        if annotation_at(path[:length]) is None:
            key = path[length - 1]
            if isinstance(key, int):
                return f"{dotted(path[: length - 1]) or 'a recipe'} is not a list, so that it has no entry {key}"
            return unknown_key(path[:length], on)
    return ""


def _set(data: Any, path: KeyPath, value: Any) -> str:
    """Sets the value at the path; returns the reason if ``data`` has no such place, else an empty text."""
    for position, key in enumerate(path):
        last = position == len(path) - 1
        if isinstance(data, list):
            if not isinstance(key, int) or key >= len(data):
                return f"{dotted(path[:position])} has {len(data)} entries, counted from 0; there is no {key}"
        elif not isinstance(data, dict):
            return f"cannot be set: {dotted(path[:position])} is neither a mapping nor a list"
        elif not last and data.get(key) is None:
            data[key] = {}
        if last:
            data[key] = value
        else:
            data = data[key]
    return ""
