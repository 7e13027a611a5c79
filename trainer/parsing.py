"""Text that others wrote, to plain data within bounds.

JSON and YAML say in a few bytes what takes hours to expand or breaks the interpreter's own limits: nesting that
recursion cannot follow, numbers that nothing can print, aliases of aliases. Whatever this process did not write itself
is read here. What is out of bounds is `Malformed`: the end of a sentence, before which its reader puts the place.
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
"""Digits of a whole number; one of so many can still be made a float."""
MOST_VALUES = 100_000
"""Values of a YAML text, what its aliases stand for counted each time."""

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

    What is out of bounds is noted while the value is parsed to its end, so that a reader of many values can go on
    behind one that it must not use.
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
        """The one value that the text holds; raises Malformed."""
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
        """The value that begins at ``at``, and where it ends. Raises JSONDecodeError where it does not end, Malformed
        where it is nested too deeply to be followed; `fault` says whether it may be used."""
        self._fault = None
        try:
            value, end = self._decoder.raw_decode(text, at)
        except RecursionError:
            raise Malformed(_TOO_DEEP) from None
        # A value of so few brackets cannot be deep, which spares nearly all of them the walk.
        if text.count("[", at, end) + text.count("{", at, end) > DEEPEST and is_deep(value):
            self._fault = _TOO_DEEP
        return value, end

    @property
    def fault(self) -> str | None:
        """Why the value that `read_at` gave last must not be used; None where it may."""
        return self._fault

    def _mapping(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            self._fault = f"the key {twice[:60]!r} stands twice in one object; keep one of them"
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
    """One JSON value, by `JsonReader`; raises Malformed."""
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
    """Returns whether UTF-8 can encode the text: not half of a surrogate pair, nor a byte that was not decoded."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class Measure(NamedTuple):
    """How many values a YAML node comes to, aliases expanded, and how many levels."""

    values: int
    levels: int


class OutOfBounds(yaml.MarkedYAMLError):
    """YAML that could be read, and is not."""


class BoundedLoader(yaml.SafeLoader):
    """SafeLoader, by the rules of YAML 1.1, that raises OutOfBounds for a text that is nested too deeply, comes to too
    many values, or contains itself. Aliases are counted for what they stand for before anything is made of them."""

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
        """Adds what a node comes to to the one around it."""
        self._check(inner, mark, open_levels=len(self._open))
        if self._open:
            outer = self._open[-1]
            self._open[-1] = Measure(outer.values + inner.values, max(outer.levels, inner.levels + 1))
            self._check(self._open[-1], mark)

    def _check(self, measure: Measure, mark: Any, open_levels: int = 0) -> None:
        if max(len(self._open), open_levels + measure.levels) > DEEPEST:
            raise OutOfBounds(None, None, _TOO_DEEP, mark)
        if measure.values > MOST_VALUES:
            said = f"it comes to more than {MOST_VALUES:,} values, aliases counted for what they stand for"
            raise OutOfBounds(None, None, said, mark)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Takes in what ``<<`` names; a key that comes in several times is kept once, the last time, as construction
        would have it, so that merges of merges do not grow."""
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
    """Plain data of one YAML 1.1 document; raises Malformed."""
    try:
        loader = BoundedLoader(text)
        try:
            value = loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise Malformed(error.problem or error.context or "it cannot be read", mark.line + 1 if mark else 0) from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # a character, a date or a number that cannot be
        raise Malformed(" ".join(str(error).split())[:200]) from error
    except (KeyError, AttributeError) as error:  # how PyYAML says that a text under !!bool or !!timestamp is none
        raise Malformed("a value in it is not of the kind that its tag says") from error
    if "\\" in text and not is_unicode(json.dumps(value, ensure_ascii=False, default=str, skipkeys=True)):
        raise Malformed(HALF_A_PAIR)
    return value
