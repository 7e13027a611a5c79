"""Look-ups in the recipe's model: the field at a path, the paths of a key, placeholder values for a field."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from trainer.recipe.base import KeyPath, Section
from trainer.recipe.root import Recipe


def options(annotation: Any) -> Iterator[Any]:
    """Yields the plain types of an annotation: the members of its unions, without Annotated."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from options(get_args(annotation)[0])
    elif origin in (Union, types.UnionType):
        for argument in get_args(annotation):
            yield from options(argument)
    else:
        yield annotation


def kinds(annotation: Any) -> set[type]:
    """Returns the Python types of an annotation's values: ``{int, list}`` for a number or a list."""
    out: set[type] = set()
    for option in options(annotation):
        origin = get_origin(option)
        if origin is Literal:
            out |= {type(value) for value in get_args(option)}
        else:
            out.add({tuple: list}.get(origin, origin) if origin else option)
    return out


def descend(annotation: Any, key: str | int) -> Any:
    """Returns the annotation of the value under ``key``; None if a value of this annotation has no such key."""
    for option in options(annotation):
        if option is Any:
            return Any
        if isinstance(option, type) and issubclass(option, Section) and key in option.model_fields:
            return option.model_fields[str(key)].annotation
        origin, arguments = get_origin(option), get_args(option)
        if origin is tuple and isinstance(key, int):
            return arguments[0]
        if origin is dict and isinstance(key, str):
            return arguments[1]
    return None


def annotation_at(path: KeyPath) -> Any:
    """Returns the annotation of the value at a path of the recipe; None for an unknown path."""
    annotation: Any = Recipe
    for key in path:
        annotation = descend(annotation, key)
        if annotation is None:
            return None
    return annotation


def section_of(annotation: Any) -> type[Section] | None:
    """Returns the section class of an annotation; None if it is no section."""
    for option in options(annotation):
        if isinstance(option, type) and issubclass(option, Section):
            return option
    return None


def field_at(path: KeyPath) -> FieldInfo | None:
    """Returns the field at a path; None for the root, for entries of lists and for an unknown path."""
    section = section_of(annotation_at(path[:-1])) if path else None
    return section.model_fields.get(str(path[-1])) if section else None


def element(annotation: Any) -> Any:
    """Returns the annotation of a list's entries; None if the annotation is no list."""
    for option in options(annotation):
        if get_origin(option) is tuple:
            return get_args(option)[0]
    return None


def places(key: str) -> list[str]:
    """Returns every dotted path that ends in this key."""
    return [dotted(path) for path in fields_below(Recipe, ()) if path and path[-1] == key]


def fields_below(section: type[Section], prefix: KeyPath) -> Iterator[KeyPath]:
    """Yields the paths of all fields, sections included; index 0 represents the entries of a list."""
    for name, field in section.model_fields.items():
        path = (*prefix, name)
        yield path
        entry = element(field.annotation)
        child = section_of(entry or field.annotation)
        if child is not None:
            yield from fields_below(child, (*path, 0) if entry else path)


def stand_in(annotation: Any) -> Any:
    """Returns a minimal valid value, with which the rest of a recipe can be checked while this part is invalid."""
    section = section_of(annotation)
    if section is not None:
        return {n: stand_in_for(f) for n, f in section.model_fields.items() if f.is_required()}
    entry = element(annotation)
    return None if entry is None else [stand_in(entry)]


def stand_in_for(field: FieldInfo) -> Any:
    """Returns the field's example if it has one, else a minimal valid value."""
    return field.examples[0] if field.examples else stand_in(field.annotation)


def dotted(path: KeyPath) -> str:
    return ".".join(str(key) for key in path)
