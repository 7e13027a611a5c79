"""A row on its way from an object to tokens, and what may be wrong with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from trainer.data.types import Bools, Tokens

Row = dict[str, Any]


class Fault(NamedTuple):
    """Why a row cannot be used; a sentence's end, since the place is put before it."""

    reason: str


@dataclass(frozen=True)
class Encoded:
    """A sample: int32 tokens [T], and bool target [T], True where a token is to be predicted; ``truncated``: it was
    longer."""

    tokens: Tokens
    target: Bools
    truncated: bool = False


def fit(sample: Encoded, sequence_length: int) -> Encoded | None:
    """The sample cut on the right to ``sequence_length`` tokens; None when no target token is left.

    Nothing predicts a sample's first token, so that it is never a target.
    """
    target = sample.target[:sequence_length].copy()
    target[:1] = False
    if not target.any():
        return None
    return Encoded(sample.tokens[:sequence_length], target, len(sample.tokens) > sequence_length)
