"""Dataclasses as rows of JSON Lines: the fields have the names of the stored ones.

Written: a field without a default always, also as null; a field that is None by default only when it has a value.
Read: a missing field has its default, or None if its type allows that, since versions differ in what they write. A row
with a field of another type was not written by muster and raises Malformed, and so does one without a field that
allows no None. Fields that the class does not know are ignored.
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
    """Returns a dataclass, also inside of lists, as plain data."""
    if is_dataclass(value):
        found = {one.name: (one, getattr(value, one.name)) for one in fields(value)}
        return {name: row_of(v) for name, (one, v) in found.items() if v is not None or one.default is MISSING}
    return [row_of(one) for one in value] if isinstance(value, list | tuple) else value


@lru_cache
def _nulls(kind: Any) -> dict[str, None]:
    """Returns null for each field that allows it and has no default."""
    hints = get_type_hints(kind)
    return {one.name: None for one in fields(kind) if one.default is MISSING and NoneType in get_args(hints[one.name])}
