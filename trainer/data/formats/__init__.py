"""Data formats: how a row becomes tokens and targets. One file each, and one line in ``trainer.registry.FORMATS``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

from trainer.data.rows import Encoded, Fault, Row
from trainer.data.spec import FrozenSource
from trainer.registry import FORMATS


class Format(Protocol):
    """Built once per source; ``encode`` answers each row with a sample or its fault, in the rows' order.

    A sample is neither truncated nor checked for targets here. The constructor raises InputError when the tokenizer
    lacks what the format needs.
    """

    def __init__(self, source: FrozenSource, tokenizer: Any, chat_template: str | None) -> None: ...

    def encode(self, rows: Sequence[Row]) -> list[Encoded | Fault]: ...


def open_format(source: FrozenSource, tokenizer: Any, chat_template: str | None) -> Format:
    kind = cast("type[Format]", FORMATS.load(source.format))
    return kind(source, tokenizer, chat_template)


def column_of(row: Row, column: str, role: str) -> Any | Fault:
    """The value in a row's column; a Fault naming the columns that are there when it is not."""
    if column not in row:
        there = ", ".join(sorted(row)) or "none"
        hint = f"map it with columns: {{{role}: NAME}}" if column == role else f"columns maps {role} to it"
        return Fault(f"the column {column!r} is not there; the columns that are: {there} ({hint})")
    return row[column]


def text_of(row: Row, column: str, role: str) -> str | Fault:
    value = column_of(row, column, role)
    if isinstance(value, str):
        return encodable(value)
    if isinstance(value, Fault):
        return value
    return Fault(f"the column {column!r} holds {type(value).__name__} ({value!r:.40}), and text is needed")


def encodable(text: str) -> str | Fault:
    """The text, or a Fault when it holds half a surrogate pair, at which a tokenizer fails with its whole batch."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return Fault(f"the text cannot be written as UTF-8 ({error.reason} at character {error.start})")
    return text
