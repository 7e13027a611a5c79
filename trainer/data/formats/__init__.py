"""Data formats: how a row becomes tokens and targets. One file each, and one line in ``trainer.registry.FORMATS``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

from trainer.data.sample import Row, RowError, Sample
from trainer.data.spec import FrozenSource, PreparationSpec
from trainer.registry import FORMATS


class Format(Protocol):
    """Built once per source; ``encode`` answers each row with a sample or its fault, in the rows' order.

    A sample is neither truncated nor checked for targets here, but for a labelled one. The constructor raises
    InputError when the tokenizer lacks what the format needs.
    """

    def __init__(self, source: FrozenSource, tokenizer: Any, spec: PreparationSpec) -> None: ...

    def encode(self, rows: Sequence[Row]) -> list[Sample | RowError]: ...


def open_format(source: FrozenSource, tokenizer: Any, spec: PreparationSpec) -> Format:
    kind = cast("type[Format]", FORMATS.load(source.format))
    return kind(source, tokenizer, spec)
