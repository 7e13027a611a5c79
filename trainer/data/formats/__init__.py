"""Data formats: how a row becomes tokens and targets. One file each, and one line in ``trainer.registry.FORMATS``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

from trainer.data.sample import Encoded, Fault, Row
from trainer.data.spec import FrozenSource, Preparation
from trainer.registry import FORMATS


class Format(Protocol):
    """Built once per source; ``encode`` answers each row with a sample or its fault, in the rows' order.

    A sample is neither truncated nor checked for targets here, but for a labelled one. The constructor raises
    InputError when the tokenizer lacks what the format needs.
    """

    def __init__(self, source: FrozenSource, tokenizer: Any, spec: Preparation) -> None: ...

    def encode(self, rows: Sequence[Row]) -> list[Encoded | Fault]: ...


def open_format(source: FrozenSource, tokenizer: Any, spec: Preparation) -> Format:
    kind = cast("type[Format]", FORMATS.load(source.format))
    return kind(source, tokenizer, spec)
