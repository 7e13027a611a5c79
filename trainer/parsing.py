"""Parses JSON and YAML from other writers into plain data, within bounds.

A few bytes of JSON or YAML can take hours to expand, or exceed limits of the interpreter: nesting too deep for
recursion, numbers that cannot be printed, aliases of aliases. All text that this process did not write itself is read
here. Text out of bounds raises `Malformed`; its reason is the end of a sentence that the caller begins with the place.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NamedTuple

import yaml

DEEPEST = 100
"""Levels of nesting."""
LONGEST_NUMBER = 100
"""Most digits of an integer. One of this length can still be converted to float."""
MOST_VALUES = 100_000
"""Values of a YAML text. The content of an alias counts each time that the alias is used."""

_BOM = "\ufeff"
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


class Malformed(ValueError):
    """Text that cannot be read, or should not be; ``line`` counts from 1, 0 where it is not known."""

    def __init__(self, reason: str, line: int = 0) -> None:
        super().__init__(reason, line)
        self.reason, self.line = reason, line

    def __str__(self) -> str:
        return self.reason


class JsonReader:
    """Reads JSON values; not thread-safe. ``finite`` refuses NaN and infinities, and halves of surrogate pairs, which
    cannot be written again; ``unique`` refuses an object that has a key twice.

    A value out of bounds is parsed to its end and its fault noted, so that a reader of many values can continue after
    a value that it must not use.
    """

    def __init__(self, *, finite: bool = True, unique: bool = True) -> None:
        self._finite = finite
        self._fault: str | None = None
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._mapping if unique else None,
            parse_int=self._whole_number,
            parse_float=self._number if finite else None,
            parse_constant=self._number if finite else None,
        )

    def read(self, text: str | bytes) -> Any:
        """Returns the one value of the text; raises Malformed."""
        if isinstance(text, bytes):
            try:
                text = text.decode()
            except UnicodeDecodeError as error:
                raise Malformed(f"it is not UTF-8 ({error.reason} at byte {error.start})") from error
        text = text.removeprefix(_BOM)
        try:
            value, end = self.read_at(text, len(text) - len(text.lstrip(" \t\r\n")))
        except json.JSONDecodeError as error:
            raise Malformed(f"{error.msg.removesuffix(' at')} (column {error.colno})", error.lineno) from error
        if rest := text[end:].strip(" \t\r\n"):
            line = text.count("\n", 0, len(text) - len(rest)) + 1
            raise Malformed(f"something follows behind its end: {rest[:40]!r}", line)
        if self._fault is None and self._finite and _SURROGATE_ESCAPE.search(text):
            self._fault = None if is_unicode(json.dumps(value, ensure_ascii=False)) else HALF_A_PAIR
        if self._fault is not None:
            raise Malformed(self._fault)
        return value

    def read_at(self, text: str, at: int) -> tuple[Any, int]:
        """Returns the value that begins at ``at``, and its end. Raises JSONDecodeError when it has no end, Malformed
        when it is nested too deeply to be parsed. The value may be used only if `fault` is None."""
        self._fault = None
        try:
            value, end = self._decoder.raw_decode(text, at)
        except RecursionError:
            raise Malformed(_TOO_DEEP) from None
        # A value with few brackets cannot be deep: nearly all values need no walk.
        if text.count("[", at, end) + text.count("{", at, end) > DEEPEST and is_deep(value):
            self._fault = _TOO_DEEP
        return value, end

    @property
    def fault(self) -> str | None:
        """Returns why the last value of `read_at` must not be used; None if it may."""
        return self._fault

    def _mapping(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            self._fault = f"the key {twice[:60]!r} appears twice in one object; keep one of them"
        return found

    def _whole_number(self, text: str) -> int:
        if len(text) > LONGEST_NUMBER:
            self._fault = too_long_a_number(text)
            return 0
        return int(text)

    def _number(self, text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            self._fault = f"the number {text[:20]} is not finite"
        return value


def parse_json(text: str | bytes, *, finite: bool = True, unique: bool = True) -> Any:
    """Reads one JSON value by `JsonReader`; raises Malformed."""
    return JsonReader(finite=finite, unique=unique).read(text)


def too_long_a_number(text: str) -> str:
    return f"the number {text[:20]}… has {len(text)} digits, and at most {LONGEST_NUMBER} are read"


_TOO_DEEP = f"it is nested deeper than {DEEPEST} levels"


def is_deep(value: Any) -> bool:
    """Returns whether lists and mappings are nested deeper than `DEEPEST`."""
    level = [value]
    for _ in range(DEEPEST):
        level = [c for v in level if isinstance(v, dict | list) for c in (v.values() if isinstance(v, dict) else v)]
    return any(isinstance(v, dict | list) for v in level)


HALF_A_PAIR = "it holds half of a surrogate pair, which UTF-8 cannot write"


def is_unicode(text: str) -> bool:
    """Returns whether UTF-8 can encode the text. It cannot encode half of a surrogate pair, or a byte that was not
    decoded."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class Measure(NamedTuple):
    """The number of values and of levels of a YAML node with its aliases expanded."""

    values: int
    levels: int


class OutOfBounds(yaml.MarkedYAMLError):
    """Valid YAML that exceeds a bound."""


class BoundedLoader(yaml.SafeLoader):
    """SafeLoader, by the rules of YAML 1.1, that raises OutOfBounds for a text that is nested too deeply, has too many
    values, or contains itself. Aliases are counted with their content before any of it is constructed."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._measures: dict[int, Measure] = {}
        self._open: list[Measure] = []

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        mark: Any = event.start_mark
        if isinstance(event, yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if id(node) not in self._measures:
                raise OutOfBounds(None, None, "it contains itself through an alias", mark)
            self._count(self._measures[id(node)], mark)
            return node
        self._open.append(Measure(1, 1))
        self._check(self._open[-1], mark)
        node = super().compose_node(parent, index)
        measure = self._open.pop()
        if event.anchor is not None:
            self._measures[id(node)] = measure
        self._count(measure, mark)
        return node

    def _count(self, inner: Measure, mark: Any) -> None:
        """Adds a node's measure to that of the node around it."""
        self._check(inner, mark, open_levels=len(self._open))
        if self._open:
            outer = self._open[-1]
            self._open[-1] = Measure(outer.values + inner.values, max(outer.levels, inner.levels + 1))
            self._check(self._open[-1], mark)

    def _check(self, measure: Measure, mark: Any, open_levels: int = 0) -> None:
        if max(len(self._open), open_levels + measure.levels) > DEEPEST:
            raise OutOfBounds(None, None, _TOO_DEEP, mark)
        if measure.values > MOST_VALUES:
            reason = f"it has more than {MOST_VALUES:,} values, with the content of its aliases counted each time"
            raise OutOfBounds(None, None, reason, mark)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merges the mappings that ``<<`` names. Of a repeated key only the last one is kept, as in construction, so
        that merges of merges do not grow."""
        super().flatten_mapping(node)
        last = {
            (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key): (key, v) for key, v in node.value
        }
        node.value = list(last.values())

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = str(self.construct_scalar(node))
        if len(text) > LONGEST_NUMBER:
            raise OutOfBounds(None, None, too_long_a_number(text), node.start_mark)
        return int(super().construct_yaml_int(node))


BoundedLoader.add_constructor("tag:yaml.org,2002:int", BoundedLoader.construct_yaml_int)


def parse_yaml(text: str) -> Any:
    """Returns the plain data of one YAML 1.1 document; raises Malformed."""
    try:
        loader = BoundedLoader(text)
        try:
            value = loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise Malformed(error.problem or error.context or "it cannot be read", mark.line + 1 if mark else 0) from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # an invalid character, date or number
        raise Malformed(" ".join(str(error).split())[:200]) from error
    except (KeyError, AttributeError) as error:  # PyYAML's errors for an invalid !!bool or !!timestamp
        raise Malformed("a value in it does not match its tag") from error
    if "\\" in text and not is_unicode(json.dumps(value, ensure_ascii=False, default=str, skipkeys=True)):
        raise Malformed(HALF_A_PAIR)
    return value
