"""Taking values out of a row: by the names that a source's ``columns`` gives them, or the format's own."""

from __future__ import annotations

import string
from typing import Any

from trainer.data.sample import Row, RowError
from trainer.data.spec import FrozenSource

_MISSING = object()


def column_of(row: Row, column: str, role: str) -> Any | RowError:
    """The value in a row's column; a Fault naming the columns that are there when it is not."""
    value = look_up(row, column)
    if value is not _MISSING:
        return value
    there = ", ".join(sorted(row)) or "none"
    hint = f"map it with columns: {{{role}: NAME}}" if column == role else f"columns maps {role} to it"
    return RowError(f"the column {column!r} is not there; the columns that are: {there} ({hint})")


def look_up(row: Row, column: str) -> Any:
    """The value in a column, or down a path of mappings that is written with dots."""
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
    """The text, or a Fault when it holds half a surrogate pair, at which a tokenizer fails with its whole batch."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return RowError(f"the text cannot be written as UTF-8 ({error.reason} at character {error.start})")
    return text


class Columns:
    """The columns of one source by their roles in its format, and its template."""

    def __init__(self, source: FrozenSource) -> None:
        self.names, self.template = source.columns, source.template
        self.fields = fields_of(source.template or "")

    def text(self, row: Row, role: str) -> str | RowError:
        return text_of(row, self.names.get(role, role), role)

    def value(self, row: Row, role: str) -> Any | RowError:
        return column_of(row, self.names.get(role, role), role)

    def optional(self, row: Row, role: str) -> Any | RowError | None:
        """None where the row lacks it or has nothing in it; a Fault where the recipe says that it is there."""
        if role in self.names:
            return self.value(row, role)
        return row.get(role)

    def answer(self, row: Row, role: str, of_prompts: bool) -> str | RowError:
        """What is said to a prompt: where only prompts are needed, "" for a row that has nothing there."""
        if of_prompts and self.optional(row, role) is None:
            return ""
        return self.text(row, role)

    def filled(self, row: Row, template: str) -> str | RowError:
        """The template with the row's columns in it."""
        values = {name: self.value(row, name) for name in self.fields}
        faults = [v for v in values.values() if isinstance(v, RowError)]
        return faults[0] if faults else encodable(template.format_map(values))


def fields_of(template: str) -> tuple[str, ...]:
    """The names that a str.format template fills in; the recipe has checked that each is a plain name."""
    return tuple(name for _, name, _, _ in string.Formatter().parse(template) if name is not None)
