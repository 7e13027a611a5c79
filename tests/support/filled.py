"""Values for the fields of any dataclass, by their types, so that a test picks up new classes and fields by itself."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

_PLAIN = {int: 7, float: 2.5, str: "a text", bool: True}


def filled(kind: type[Any], **given: Any) -> Any:
    """An instance whose fields have values other than None, 0 or empty, except those ``given``."""
    hints = get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind) if field.name not in given]
    return kind(**given, **{name: value_of(hints[name]) for name in names})


def value_of(hint: Any) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return value_of(arguments[0])
    if origin in (Union, types.UnionType):
        return value_of(next(one for one in arguments if one is not types.NoneType))
    if dataclasses.is_dataclass(hint):
        return filled(hint)  # type: ignore[arg-type]
    if origin in (tuple, list):
        return origin([value_of(arguments[0])] * 2)
    if origin is Mapping:
        return {"a key": value_of(arguments[1])}
    return "anything" if hint is Any else _PLAIN[hint]


def wrong_for(hint: Any) -> Any:
    """A value of another type than the field's, as JSON has it."""
    return 7 if isinstance(value_of(hint), str) else "a text"
