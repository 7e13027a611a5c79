"""A row on its way from an object to tokens, and what may be wrong with it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from trainer.data.types import Bools, Tokens, TokenTypes

Row = dict[str, Any]

ROW_BYTES = 64 << 20
"""What a row may take of its file: about 16 million tokens. A line, a CSV record or a cell that is longer is a fault of
its row, and is passed over without being held."""

TOO_LONG = f"longer than {ROW_BYTES >> 20} MiB, the most that a row may have; split it, or leave it out"


class RowError(NamedTuple):
    """Why a row cannot be used; a sentence's end, since the place is put before it."""

    reason: str


@dataclass(frozen=True)
class Sample:
    """A sample: int32 tokens [T], and bool target [T], True where a token is to be predicted; ``truncated``: it was
    longer; ``splits``: one that is too long is cut into several instead.

    With a ``label``, the one target is the last token, from which the label is predicted; ``token_types`` int8 [T] tell
    an encoder the two texts of a pair apart. With ``rejected``, this is the chosen one of two answers; ``margin`` says
    by how much.
    """

    tokens: Tokens
    target: Bools
    truncated: bool = False
    splits: bool = False
    label: int | None = None
    token_types: TokenTypes | None = None
    rejected: Sample | None = None
    margin: float | None = None


def fit(sample: Sample, sequence_length: int) -> list[Sample]:
    """The sample in at most ``sequence_length`` tokens: cut on the right, or into several; none when no target is left.

    Nothing predicts a sample's first token, so that it is never a target. The pieces of one that splits overlap by a
    token, so that each of its tokens but the first is a target once.
    """
    if sample.label is not None:
        return [sample]  # its format has cut it, since what stands at the end has to stay there
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
