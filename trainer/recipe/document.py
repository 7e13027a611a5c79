"""The parser of a recipe's text: YAML or JSON to plain data, with the line of every value.

YAML is read by the rules of version 1.2, which people expect: ``1e-4`` is a number; ``on``, ``no`` and ``2026-01-01``
are text. PyYAML without changes follows version 1.1.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import yaml

from trainer.parsing import (
    HALF_A_PAIR,
    LONGEST_NUMBER,
    BoundedLoader,
    Malformed,
    OutOfBounds,
    is_unicode,
    parse_json,
    too_long_a_number,
)
from trainer.recipe.base import KeyPath, show


class Note(NamedTuple):
    """A mistake in the text, without the name of its file. ``line`` counts from 1; 0 means no line."""

    line: int
    path: KeyPath
    message: str


class Document(NamedTuple):
    """A parsed text. ``lines``: the line of each key and list entry, by path. ``notes``: mistakes in the text."""

    data: Any
    lines: dict[KeyPath, int]
    notes: list[Note]


NULL, BOOL, INT, FLOAT = (f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float"))
RESOLVERS = (
    (NULL, r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    (BOOL, r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    (INT, r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F]+", list("-+0123456789")),
    (FLOAT, r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    (FLOAT, r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
)


PLAIN_TAGS = {NULL, BOOL, INT, FLOAT, *(f"tag:yaml.org,2002:{kind}" for kind in ("str", "map", "seq"))}
SURROGATE_PAIR = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}")


class Loader(BoundedLoader):
    """BoundedLoader with the plain scalars of YAML 1.2."""


class Dumper(yaml.SafeDumper):
    """SafeDumper that quotes each text that YAML 1.1 or 1.2 would read as another type."""


def _text(dumper: Dumper, text: str) -> yaml.ScalarNode:
    # In its other styles, PyYAML treats U+0085 as a line break and reads it back as a space.
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\x85" in text else None)


Dumper.add_representer(str, _text)

Loader.yaml_implicit_resolvers = {}  # else add_implicit_resolver would start from a copy of version 1.1's
for _tag, _pattern, _first in RESOLVERS:
    _whole = re.compile(rf"^(?:{_pattern})$")
    Loader.add_implicit_resolver(_tag, _whole, _first)
    Dumper.add_implicit_resolver(_tag, _whole, _first)
Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"^(?:<<)$"), ["<"])


def _integer(loader: Loader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node)).replace("_", "")
    if len(text) > LONGEST_NUMBER:
        raise OutOfBounds(None, None, too_long_a_number(text), node.start_mark)
    return int(text, 16) if text.lower().startswith("0x") else int(text)


Loader.add_constructor(INT, _integer)


def read_yaml(text: str) -> Document:
    """Parses YAML. After a syntax error, ``data`` is None and ``notes`` contains the error."""
    try:
        loader = Loader(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        return Document(
            None, {}, [Note(line, (), f"is not YAML: the character {text[error.position]!r} is not allowed")]
        )
    try:
        return _Walk(loader).document(loader.get_single_node())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        if isinstance(error, OutOfBounds):
            return Document(None, {}, [Note(line, (), str(error.problem))])
        return Document(None, {}, [Note(line, (), f"is not YAML: {error.problem or error.context}{_advice(error)}")])
    finally:
        loader.dispose()


def read_json(text: str) -> Document:
    """Parses JSON. After a syntax error, ``data`` is None and ``notes`` contains the error."""
    try:
        data = parse_json(text, unique=False)  # the YAML pass below notes a duplicate key, with both lines
    except Malformed as error:
        return Document(None, {}, [Note(error.line, (), f"is not JSON: {error}" if error.line else str(error))])
    # The YAML parser gives the lines: JSON is also YAML if its tabs are replaced (JSON strings cannot contain them).
    # JSON may escape one character as a surrogate pair, which YAML refuses; only lines are needed here, so "x" does.
    _, lines, notes = read_yaml(SURROGATE_PAIR.sub("x", text.replace("\t", " ")))
    return Document(data, lines, [note for note in notes if note.path])


def read_value(text: str) -> Any:
    """Parses the value of an override as YAML; text that is not YAML stays text."""
    document = read_yaml(text)
    return text if document.notes else document.data


def _advice(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or ""
    if "\\t" in problem:
        return "; indent with spaces, not tabs"
    if "mapping values are not allowed" in problem:
        return "; put text that holds ': ' in quotes, and check the indentation"
    if "alias" in (error.context or "") or "undefined alias" in problem:
        return "; put text that begins with '*' or '&' in quotes"
    return ""


class _Walk:
    """One pass over the node tree. Collects values, lines, and mistakes that PyYAML's own loading ignores."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader
        self.lines: dict[KeyPath, int] = {}
        self.notes: list[Note] = []

    def document(self, node: yaml.Node | None) -> Document:
        data = None if node is None else self.value(node, ())
        return Document(data, self.lines, self.notes)

    def value(self, node: yaml.Node, path: KeyPath) -> Any:
        if node.tag not in PLAIN_TAGS:
            return self._note(node, path, f"cannot be read: it has the tag {node.tag[:60]}; write the value without it")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            out: list[Any] = []
            for here, child in (((*path, i), child) for i, child in enumerate(node.value)):
                self.lines[here] = child.start_mark.line + 1
                out.append(self.value(child, here))
            return out
        return self._scalar(node, path)

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        node.value = self._first_of_each(node, path)
        self.loader.flatten_mapping(node)
        out: dict[str, Any] = {}
        for key, child in node.value:
            here = (*path, str(key.value))
            self.lines[here] = key.start_mark.line + 1
            out[str(key.value)] = self.value(child, here)
        return out

    def _first_of_each(self, node: yaml.MappingNode, path: KeyPath) -> list[tuple[yaml.Node, yaml.Node]]:
        """Returns the entries with a text key, the first one of each key. Called before ``<<`` entries are merged."""
        lines: dict[str, int] = {}
        entries: list[tuple[yaml.Node, yaml.Node]] = []
        for key, child in node.value:
            if not isinstance(key, yaml.ScalarNode) or not is_unicode(key.value):
                self._note(key, path, "has a key that is not text")
            elif key.value in lines:
                message = f"is given twice, first on line {lines[key.value]}; keep one of them"
                self._note(key, (*path, str(key.value)), message)
            else:
                lines[key.value] = key.start_mark.line + 1
                entries.append((key, child))
        return entries

    def _scalar(self, node: yaml.Node, path: KeyPath) -> Any:
        try:
            if not is_unicode(node.value):
                return self._note(node, path, f"{HALF_A_PAIR}: {show(node.value)}")
            return self.loader.construct_object(node)
        except OutOfBounds as error:
            return self._note(node, path, str(error.problem))
        except (yaml.YAMLError, ValueError, KeyError):
            return self._note(node, path, f"cannot be read as {node.tag.rsplit(':', 1)[-1]}: {show(node.value)}")

    def _note(self, node: yaml.Node, path: KeyPath, message: str) -> None:
        self.notes.append(Note(node.start_mark.line + 1, path, message))
