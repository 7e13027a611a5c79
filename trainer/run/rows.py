"""Writes dataclasses as rows of JSON Lines, and reads them. The fields of a row have the names of the class.

Writing: a field without a default is always written, also as null; a field whose default is None is written only if it
has a value. Reading: a missing field gets its default, or None if its type allows that, since versions differ in what
they write. A field of another type raises Malformed, because muster did not write such a row, and so does a missing
field that allows no None. Fields that the class does not know are ignored.
"""

from __future__ import annotations

from dataclasses import MISSING, fields, is_dataclass
from functools import lru_cache
from types import NoneType
from typing import Any, TypeVar, cast, get_args, get_type_hints

from trainer.records import read_record

T = TypeVar("T")


def read_row(kind: type[T], row: Any) -> T:
    return read_record(kind, {**_nulls(cast("Any", kind)), **row} if isinstance(row, dict) else row)


def row_of(value: Any) -> Any:
    """Returns a dataclass, or the dataclasses in a list, as plain data."""
    if is_dataclass(value):
        found = {one.name: (one, getattr(value, one.name)) for one in fields(value)}
        return {name: row_of(v) for name, (one, v) in found.items() if v is not None or one.default is MISSING}
    return [row_of(one) for one in value] if isinstance(value, list | tuple) else value


@lru_cache
def _nulls(kind: Any) -> dict[str, None]:
    """Returns null for each field that allows it and has no default."""
    hints = get_type_hints(kind)
    return {one.name: None for one in fields(kind) if one.default is MISSING and NoneType in get_args(hints[one.name])}
