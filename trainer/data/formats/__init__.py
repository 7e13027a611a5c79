"""Data formats: each converts rows to tokens and targets. Each has a file, and an entry in
``trainer.recipe.formats.FORMATS``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

from trainer.data.sample import Row, RowError, Sample
from trainer.data.spec import FrozenSource, PreparationSpec
from trainer.recipe.formats import FORMATS


class Format(Protocol):
    """A data format, built once per source. ``encode`` returns a sample, several, or a RowError per row, in the rows'
    order.

    Formats neither truncate samples nor check for targets; only labelled samples are truncated here. The constructor
    raises InputError if the tokenizer lacks something that the format needs.
    """

    def __init__(self, source: FrozenSource, tokenizer: Any, spec: PreparationSpec) -> None: ...

    def encode(self, rows: Sequence[Row]) -> Sequence[Sample | list[Sample] | RowError]: ...


def open_format(source: FrozenSource, tokenizer: Any, spec: PreparationSpec) -> Format:
    kind = cast("type[Format]", FORMATS.load(source.format))
    return kind(source, tokenizer, spec)
