"""A recipe's text: YAML or JSON to plain data, with the line of every value.

YAML is read by the rules of its version 1.2, which people expect: ``1e-4`` is a number, ``on`` and ``no`` are text, and
so is ``2026-01-01``. PyYAML by itself follows 1.1.
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
    """A mistake before its file is named. ``line`` counts from 1; 0 stands for none."""

    line: int
    path: KeyPath
    message: str


class Document(NamedTuple):
    """``lines`` has the line of each key or list entry by its path; ``notes`` what the text itself does wrong."""

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
    """SafeDumper that quotes whatever either version of YAML would take for something else than text."""


def _text(dumper: Dumper, text: str) -> yaml.ScalarNode:
    # PyYAML takes the character U+0085 for a line break in its other styles, and reads it back as a space.
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\x85" in text else None)


Dumper.add_representer(str, _text)

Loader.yaml_implicit_resolvers = {}  # or add_implicit_resolver would begin with a copy of version 1.1's
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
    """Parse YAML; a syntax error ends up in the notes, with data None."""
    try:
        loader = Loader(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        return Document(
            None, {}, [Note(line, (), f"is not YAML: the character {text[error.position]!r} cannot stand in it")]
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
    """Parse JSON. JSON is YAML too once tabs are spaces (they cannot stand inside its strings), hence the lines."""
    try:
        data = parse_json(text, unique=False)  # a key that stands twice is noted below, with its lines
    except Malformed as error:
        return Document(None, {}, [Note(error.line, (), f"is not JSON: {error}" if error.line else str(error))])
    # YAML escapes characters one by one, and JSON some of them in halves; only lines are asked for here.
    _, lines, notes = read_yaml(SURROGATE_PAIR.sub("x", text.replace("\t", " ")))
    return Document(data, lines, [note for note in notes if note.path])


def read_value(text: str) -> Any:
    """One value of an override, as YAML would read it; text that is not YAML stays text."""
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
    """One pass over the node tree: values, lines, and the mistakes that plain loading would pass over."""

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
            return [self._entry(child, (*path, i)) for i, child in enumerate(node.value)]
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
        """The entries whose key is text and stands for the first time, before merged ones (``<<``) come in."""
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

    def _entry(self, node: yaml.Node, path: KeyPath) -> Any:
        self.lines[path] = node.start_mark.line + 1
        return self.value(node, path)

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
