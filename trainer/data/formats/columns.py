"""Reads the values of a row by the column names in a source's ``columns``, or else by the format's own names."""

from __future__ import annotations

import string
from typing import Any

from trainer.data.sample import Row, RowError
from trainer.data.spec import FrozenSource

_MISSING = object()


def column_of(row: Row, column: str, role: str) -> Any | RowError:
    """Returns the value in a row's column; a RowError with the names of the existing columns if it is missing."""
    value = look_up(row, column)
    if value is not _MISSING:
        return value
    there = ", ".join(sorted(row)) or "none"
    hint = f"map it with columns: {{{role}: NAME}}" if column == role else f"columns maps {role} to it"
    return RowError(f"the column {column!r} is missing; the row's columns: {there} ({hint})")


def look_up(row: Row, column: str) -> Any:
    """Returns the value in a column, or at a path of nested mappings, written with dots."""
    if column in row:
        return row[column]
    value: Any = row
    for name in column.split("."):
        if not isinstance(value, dict) or name not in value:
            return _MISSING
        value = value[name]
    return value


def text_of(row: Row, column: str, role: str) -> str | RowError:
    return as_text(column_of(row, column, role), column)


def as_text(value: Any | RowError, column: str) -> str | RowError:
    if isinstance(value, str):
        return encodable(value)
    if isinstance(value, RowError):
        return value
    return RowError(f"the column {column!r} holds {type(value).__name__} ({value!r:.40}), and text is needed")


def encodable(text: str) -> str | RowError:
    """Returns the text, or a RowError if it contains half a surrogate pair."""
    # A tokenizer fails on such a text, and with it all of its batch.
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return RowError(f"the text cannot be written as UTF-8 ({error.reason} at character {error.start})")
    return text


class Columns:
    """The columns of one source, by their roles in its format, and its template."""

    def __init__(self, source: FrozenSource) -> None:
        self.names, self.template, self.nulls = source.columns, source.template, source.nulls
        self.fields = fields_of(source.template or "")

    def text(self, row: Row, role: str) -> str | RowError:
        return text_of(row, self.names.get(role, role), role)

    def value(self, row: Row, role: str) -> Any | RowError:
        return column_of(row, self.names.get(role, role), role)

    def optional(self, row: Row, role: str) -> Any | RowError | None:
        """Returns the value; None if it is missing or empty, but a RowError if it is missing and the recipe names
        it."""
        if role in self.names:
            return self.value(row, role)
        return row.get(role)

    def answer(self, row: Row, role: str, of_prompts: bool) -> str | RowError:
        """Returns the answer's text. If only prompts are needed (``of_prompts``), a row without an answer gives ""."""
        if of_prompts and self.optional(row, role) is None:
            return ""
        return self.text(row, role)

    def filled(self, row: Row, template: str) -> str | RowError:
        """Returns the template, filled with the row's columns."""
        values = {name: self.value(row, name) for name in self.fields}
        faults = [v for v in values.values() if isinstance(v, RowError)]
        if faults:
            return faults[0]
        for name in (name for name, value in values.items() if value is None):
            if self.nulls == "fault":
                return RowError(f"the column {self.names.get(name, name)!r} of the template is null")
            values[name] = ""
        return encodable(template.format_map(values))


def fields_of(template: str) -> tuple[str, ...]:
    """Returns the names in a str.format template. The recipe has checked that each is a plain name."""
    return tuple(name for _, name, _, _ in string.Formatter().parse(template) if name is not None)
