"""Turns pydantic's errors into sentences for the author of a recipe."""

from __future__ import annotations

import re
from typing import Any

from pydantic_core import ErrorDetails

from trainer.recipe import synonyms
from trainer.recipe.base import KeyPath, show
from trainer.recipe.tree import annotation_at, dotted, field_at, places, section_of
from trainer.registry import choose_hint

RIGHT = {
    "int_type": "takes a whole number",
    "int_from_float": "takes a whole number",
    "float_type": "takes a number",
    "finite_number": "takes a finite number",
    "string_type": "takes text",
    "bool_type": "takes true or false",
    "tuple_type": "takes a list",
    "list_type": "takes a list",
    "dict_type": "takes a mapping of keys to values",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
}


def path_of(error: ErrorDetails) -> KeyPath:
    """Returns the path of the error, without the tags that pydantic adds for keys."""
    return tuple(key for key in error["loc"] if key != "[key]")


def sentence(error: ErrorDetails) -> str:
    """Returns one sentence: what is wrong at the error's path, the value got, and what would be right."""
    kind, path, context = error["type"], path_of(error), error.get("ctx", {})
    if kind == "extra_forbidden":
        return unknown_key(path, on=error["input"] not in (False, None))
    if kind == "missing":
        return _missing(path)
    if said := synonyms.of_value(path, error["input"]):
        return f"{show(error['input'])} is a word of other trainers; {said}"
    if kind == "value_error":
        return str(context["error"])
    if kind in ("model_type", "model_attributes_type"):
        return f"takes a mapping with {_keys(path)}, got {show(error['input'])}"
    if kind == "literal_error":
        names, value = tuple(re.findall(r"'([^']*)'", context["expected"])), error["input"]
        hint = choose_hint(value, names) if isinstance(value, str) else ""
        return f"{show(value)} is not one of: {', '.join(names)}{hint}"
    right = RIGHT.get(kind, error["msg"]).format(**context)
    return f"{right}, got {show(error['input'])}{_quotes(kind, error['input'])}"


def unknown_key(path: KeyPath, on: bool = True) -> str:
    """Returns the message for an unknown key: its name in a recipe if other trainers have the key, a similar key, the
    paths of this key, or the keys that exist. ``on``: the key has a value other than false."""
    if said := synonyms.of_key(path[-1], on):
        return f"unknown key; {said}"
    key, section = str(path[-1]), section_of(annotation_at(path[:-1]))
    here = tuple(section.model_fields) if section else ()
    hint = choose_hint(key, here)
    if section and section.others:
        return f"unknown key; {dotted(path[:-1])} takes: {', '.join(here)}; {section.others}"
    if elsewhere := places(key):
        return f"unknown key here; it belongs at {' or '.join(elsewhere)}"
    if hint:
        return f"unknown key{hint}"
    where = dotted(path[:-1]) or "a recipe"
    return f"unknown key; {where} takes: {', '.join(here)}" if here else f"unknown key; {where} takes no keys"


def _missing(path: KeyPath) -> str:
    field = field_at(path)
    description = (field.description or "") if field else ""
    if field is None or not field.examples:
        section = section_of(annotation_at(path))
        if section is None:
            return "is missing"
        short = section.model_fields[section.shorthand].examples if section.shorthand else None
        text = f", or a text: {path[-1]}: {short[0]}" if short else ""
        return f"is missing; it takes a mapping with {_keys(path)}{text}"
    first = re.split(r"(?<=[.:;])\s", " ".join(description.split()))[0].rstrip(".:;")
    return f"is missing ({first}); for example {path[-1]}: {field.examples[0]}"


def _keys(path: KeyPath) -> str:
    section = section_of(annotation_at(path))
    return ", ".join(section.model_fields) if section else ""


def _quotes(kind: str, value: Any) -> str:
    if kind == "string_type" and isinstance(value, bool | int | float):
        return "; write it in quotes"
    if kind in ("int_type", "float_type") and isinstance(value, str) and re.fullmatch(r"[-+.\deE]*\d", value):
        return "; write it without quotes"
    if kind == "bool_type" and str(value).lower() in ("yes", "no", "on", "off", "0", "1"):
        return "; write true or false in full"
    return ""
