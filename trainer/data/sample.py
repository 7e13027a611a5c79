"""A row between its input object and its tokens, and the errors that a row may have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy.typing as npt

from trainer.data.types import Bools, Tokens, TokenTypes

Row = dict[str, Any]

ROW_BYTES = 64 << 20
"""The largest row, in bytes of its file: about 16 million tokens. A longer line, CSV record or cell is an error of its
row, and is skipped without being held in memory."""

TOO_LONG = f"longer than {ROW_BYTES >> 20} MiB, the most that a row may have; split it, or leave it out"


class RowError(NamedTuple):
    """The reason why a row cannot be used. It ends a sentence: messages put the row's place before it."""

    reason: str


@dataclass(frozen=True)
class Sample:
    """A sample: int32 tokens [T], and bool target [T], True where a token is to be predicted.

    ``truncated``: the sample was longer. ``splits``: a sample that is too long is cut into several instead of
    truncated. With a ``label``, the only target is the last token, from which the label is predicted. ``token_types``
    int8 [T] separate the two texts of a pair for an encoder. With ``rejected``, this sample is the chosen one of two
    answers, and ``margin`` is the preference's margin. ``desirable``: the answer is a good one; ``unrelated``: the
    prompt with an answer to another prompt. ``outputs``: what a frozen model computed for the sample
    (`trainer.data.outputs`). ``turn``: of a conversation that is trained as several samples,
    the number of the last message that this one trains, from 1. ``warnings``: what is odd about it; a source's warnings
    are shown once.
    """

    tokens: Tokens
    target: Bools
    truncated: bool = False
    splits: bool = False
    label: int | None = None
    token_types: TokenTypes | None = None
    rejected: Sample | None = None
    margin: float | None = None
    desirable: bool | None = None
    unrelated: Sample | None = None
    outputs: Mapping[str, npt.NDArray[Any]] | None = None
    turn: int = 0
    warnings: tuple[str, ...] = ()


def fit(sample: Sample, sequence_length: int) -> list[Sample]:
    """Cuts the sample to at most ``sequence_length`` tokens: truncates it on the right, or splits it into several.

    Returns an empty list when no target is left. A sample's first token is never a target, since no token precedes it.
    The pieces of a sample that splits overlap by one token, so that each token except the first is a target once.
    """
    if sample.label is not None:
        return [sample]  # its format has truncated it already, since the special tokens at the end must stay
    if sample.splits and len(sample.tokens) > sequence_length:
        starts = range(0, len(sample.tokens) - 1, sequence_length - 1)
        return [piece for at in starts for piece in _cut(sample, at, sequence_length, truncated=False)]
    if sample.rejected is None:
        return _cut(sample, 0, sequence_length, len(sample.tokens) > sequence_length)
    sides = [fit(replace(side, rejected=None), sequence_length) for side in (sample, sample.rejected)]
    if not all(sides):
        return []
    (chosen,), (rejected,) = sides
    return [replace(chosen, rejected=rejected, truncated=chosen.truncated or rejected.truncated)]


def _cut(sample: Sample, start: int, length: int, truncated: bool) -> list[Sample]:
    target = sample.target[start : start + length].copy()
    target[:1] = False
    if not target.any():
        return []
    return [replace(sample, tokens=sample.tokens[start : start + length], target=target, truncated=truncated)]
