"""Reads stored records into classes, and checks every field's type.

A storage may contain anything: other programs and other versions of muster can write to it. So each reader declares the
fields that it relies on by a dataclass, a NamedTuple or a TypedDict, and any other record raises `Malformed` here, not
a TypeError later. Keys that the class does not know are ignored: a newer muster may have written them.
"""

from __future__ import annotations

import dataclasses
import math
import reprlib
import types
from collections.abc import Mapping
from functools import lru_cache
from typing import (
    Annotated,
    Any,
    NamedTuple,
    Required,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from trainer.parsing import Malformed

T = TypeVar("T")


class Between(NamedTuple):
    """The bounds of a number."""

    low: float
    high: float


Count = Annotated[int, Between(0, 2**63 - 1)]
"""An integer that is not negative."""
UnixTime = Annotated[float, Between(0.0, 253_402_300_799.0)]
"""Seconds since 1970, up to the year 9999, the last one of `datetime`."""


class _FieldPath(NamedTuple):
    """The place of a value in its record; ``exact``: unknown keys are an error there."""

    path: str
    exact: bool

    def at(self, name: str) -> _FieldPath:
        name = name[:60] if name.isprintable() else repr(name[:60])
        return self._replace(path=f"{self.path}.{name}" if self.path else name)


def read_record(kind: type[T], value: Any, *, exact: bool = False) -> T:
    """Returns ``value``, plain data as from JSON, as a ``kind``. Raises Malformed, which names the wrong field. With
    ``exact`` a field that the class does not know is wrong too, for records in which it must not be ignored."""
    return cast("T", _read(kind, value, _FieldPath("", exact)))


def _read(kind: Any, value: Any, place: _FieldPath) -> Any:
    if kind in _NAMES:  # first, because most values are plain, and a long run has many rows
        return _read_plain(kind, value, place)
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin is Annotated:
        found, bounds = _read(arguments[0], value, place), arguments[1]
        inside = bounds.low <= found <= bounds.high
        return found if inside else _refuse(value, place, f"one from {bounds.low:g} to {bounds.high:g}")
    if origin in (Union, types.UnionType):  # an optional type: one option, and None
        (other,) = (option for option in arguments if option is not types.NoneType)
        return None if value is None else _read(other, value, place)
    if is_typeddict(kind):
        return {**_object(value, place), **_read_fields(kind, _object(value, place), place)}
    if dataclasses.is_dataclass(kind):
        return cast("Any", kind)(**_read_fields(kind, _object(value, place), place))
    if origin is not None:
        return _read_collection(origin, arguments, value, place)
    return _read_named_tuple(kind, value, place)


def _read_fields(kind: Any, value: Mapping[str, Any], place: _FieldPath) -> dict[str, Any]:
    hints, needed = _fields(kind)
    if missing := sorted(needed - value.keys()):
        raise Malformed(f"{place.at(missing[0]).path} is missing")
    if place.exact and (unknown := sorted(value.keys() - hints.keys())):
        raise Malformed(f"{place.at(unknown[0]).path} is not known to this version of muster; update it")
    return {name: _read(hint, value[name], place.at(name)) for name, hint in hints.items() if name in value}


def _read_collection(origin: Any, arguments: tuple[Any, ...], value: Any, place: _FieldPath) -> Any:
    if issubclass(origin, Mapping):
        return {name: _read(arguments[1], v, place.at(name)) for name, v in _object(value, place).items()}
    if not isinstance(value, list):
        _refuse(value, place, "a list")
    found = [_read(arguments[0], v, place.at(str(i))) for i, v in enumerate(value)]
    return tuple(found) if origin is tuple else found


def _read_named_tuple(kind: Any, value: Any, place: _FieldPath) -> Any:
    hints, _ = _fields(kind)
    if not isinstance(value, list) or len(value) != len(hints):
        _refuse(value, place, f"a list of {', '.join(hints)}")
    return kind(*(_read(hint, v, place.at(name)) for (name, hint), v in zip(hints.items(), value, strict=True)))


def _read_plain(kind: Any, value: Any, place: _FieldPath) -> Any:
    # `type(...) is` and not isinstance: in Python bool is a kind of int, which it must not be here.
    if kind is float and type(value) in (int, float):
        return value if math.isfinite(value) else _refuse(value, place, "a finite number")
    if type(value) is not kind:
        _refuse(value, place, _NAMES[kind])
    return value


_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def _object(value: Any, place: _FieldPath) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else cast("Mapping[str, Any]", _refuse(value, place, "an object"))


def _refuse(value: Any, place: _FieldPath, right: str) -> Any:
    raise Malformed(f"{place.path or 'it'} is {reprlib.repr(value)}, and {right} is needed")


@lru_cache(maxsize=256)
def _fields(kind: Any) -> tuple[dict[str, Any], set[str]]:
    """Returns each field's type, and the required fields."""
    hints = get_type_hints(kind, include_extras=True)
    if dataclasses.is_dataclass(kind):
        own = {field.name: field for field in dataclasses.fields(kind)}
        needed = {n for n, f in own.items() if f.default is f.default_factory is dataclasses.MISSING}
        return {name: hints[name] for name in own}, needed
    # Where annotations are strings, a TypedDict does not see its own Required.
    marked = {name for name, hint in hints.items() if get_origin(hint) is Required}
    plain = {name: get_args(hint)[0] if name in marked else hint for name, hint in hints.items()}
    return plain, marked | set(getattr(kind, "__required_keys__", ()))
