"""Stored records, held to the types of the classes that they are read into.

Whoever can write to a storage may have put anything there, and so may another version of muster. So each reader says by
a dataclass, a NamedTuple or a TypedDict what it relies on, and a record that is anything else is `Malformed`, never a
TypeError somewhere behind. Keys that the class does not know are passed over: a newer muster may have written them.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from functools import lru_cache
from typing import (
    Annotated,
    Any,
    Literal,
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
"""A whole number that is not negative."""
UnixTime = Annotated[float, Between(0.0, 253_402_300_799.0)]
"""Seconds since 1970, up to the last year that a date can be written of."""


def read_record(kind: type[T], value: Any) -> T:
    """``value``, plain data as JSON gives it, as a ``kind``; raises Malformed, which names the field that is wrong."""
    return cast("T", _read(kind, value, ""))


def _read(kind: Any, value: Any, path: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin is Annotated:
        found, bounds = _read(arguments[0], value, path), arguments[1]
        inside = bounds.low <= found <= bounds.high
        return found if inside else _refuse(value, path, f"one from {bounds.low:g} to {bounds.high:g}")
    if origin in (Union, types.UnionType):
        return _read_one_of(arguments, value, path)
    if origin is Literal:
        known = isinstance(value, str) and value in arguments
        return value if known else _refuse(value, path, " or ".join(map(repr, arguments)))
    if is_typeddict(kind):
        return {**_object(value, path), **_read_fields(kind, _object(value, path), path)}
    if dataclasses.is_dataclass(kind):
        return cast("Any", kind)(**_read_fields(kind, _object(value, path), path))
    if origin is not None:
        return _read_collection(origin, arguments, value, path)
    if isinstance(kind, type) and hasattr(kind, "_fields"):
        return _read_named_tuple(kind, value, path)
    return _read_plain(kind, value, path)


def _read_one_of(options: tuple[Any, ...], value: Any, path: str) -> Any:
    if value is None and types.NoneType in options:
        return None
    others = [option for option in options if option is not types.NoneType]
    for option in others[:-1]:
        try:
            return _read(option, value, path)
        except Malformed:
            continue
    return _read(others[-1], value, path)


def _read_fields(kind: Any, value: Mapping[str, Any], path: str) -> dict[str, Any]:
    hints, needed = _hints(kind)
    if missing := sorted(needed - value.keys()):
        raise Malformed(f"{_at(path, missing[0])} is missing")
    return {name: _read(hint, value[name], _at(path, name)) for name, hint in hints.items() if name in value}


def _read_collection(origin: Any, arguments: tuple[Any, ...], value: Any, path: str) -> Any:
    if issubclass(origin, Mapping):
        return {name: _read(arguments[1], v, _at(path, name)) for name, v in _object(value, path).items()}
    if not isinstance(value, list):
        _refuse(value, path, "a list")
    found = [_read(arguments[0], v, _at(path, str(i))) for i, v in enumerate(value)]
    return tuple(found) if origin is tuple else found


def _read_named_tuple(kind: Any, value: Any, path: str) -> Any:
    hints, _ = _hints(kind)
    if not isinstance(value, list) or len(value) < len(hints):
        _refuse(value, path, f"a list of {', '.join(hints)}")
    return kind(*(_read(hint, v, _at(path, name)) for (name, hint), v in zip(hints.items(), value, strict=False)))


def _read_plain(kind: Any, value: Any, path: str) -> Any:
    """bool is a kind of int to Python, and of nothing else here."""
    if kind is float and type(value) in (int, float):
        return value if math.isfinite(value) else _refuse(value, path, "a finite number")
    if type(value) is not kind:
        _refuse(value, path, _NAMES[kind])
    return value


_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null"}


def _object(value: Any, path: str) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else cast("Mapping[str, Any]", _refuse(value, path, "an object"))


def _refuse(value: Any, path: str, right: str) -> Any:
    shown = repr(value)
    raise Malformed(f"{path or 'it'} is {shown if len(shown) <= 60 else f'{shown[:59]}…'}, and {right} is needed")


def _at(path: str, name: str) -> str:
    return f"{path}.{name[:60]}" if path else name[:60]


@lru_cache(maxsize=256)
def _hints(kind: Any) -> tuple[dict[str, Any], set[str]]:
    """Each field's type, and the fields that have to be there."""
    hints = get_type_hints(kind, include_extras=True)
    if dataclasses.is_dataclass(kind):
        return hints, {
            f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING
        }
    # Where annotations are strings, a TypedDict does not see its own Required.
    marked = {name for name, hint in hints.items() if get_origin(hint) is Required}
    plain = {name: get_args(hint)[0] if name in marked else hint for name, hint in hints.items()}
    return plain, marked | set(getattr(kind, "__required_keys__", ()))
