"""Encodes the rows of one source: which rows belong to the part, what becomes of each, and what is odd about it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from trainer.data.formats import open_format
from trainer.data.formats.columns import fields_of, look_up
from trainer.data.formats.turns import MEDIA
from trainer.data.sample import Row, RowError, Sample
from trainer.data.spec import FrozenSource, PreparationSpec
from trainer.recipe.formats import FORMATS

MEANINGFUL = {
    *("system", "history", "tools", "functions", "documents", *MEDIA),
    *("label", "labels", "weight", "score", "margin", "chosen", "rejected", "kto_tag"),
    *("reasoning", "reasoning_content", "thinking", "messages", "conversations"),
}
"""Columns that carry meaning in the layouts of other tools."""


class EncodedRow(NamedTuple):
    """A row's position, its samples or its fault, and what is odd about the row; samples have warnings of their own."""

    row: int
    samples: list[Sample] | RowError
    warnings: tuple[str, ...] = ()


class RowEncoder:
    """Encodes the rows of a source. ``warnings``: those of all rows so far, in the order of their appearance.

    Raises InputError if the tokenizer lacks something that the format needs."""

    def __init__(self, source: FrozenSource, tokenizer: Any, spec: PreparationSpec) -> None:
        self.source, self.format = source, open_format(source, tokenizer, spec)
        row = FORMATS[source.format]
        names = [*row.reads(source.style), *fields_of(source.template or ""), *(["conversations"] if row.chats else [])]
        read = {source.columns.get(name, name).split(".")[0] for name in names}
        self._watched = MEANINGFUL - read
        self._nullable = [source.columns.get(name, name) for name in fields_of(source.template or "")]
        self.warnings: dict[str, None] = {}
        self._vocabulary = spec.vocabulary

    def encode(self, batch: Sequence[tuple[int, Row | RowError]]) -> Iterator[EncodedRow]:
        """Yields the rows of this part, in order. Encodes all rows without an error as one batch."""
        kept = [(number, row) for number, row in batch if self._belongs(row)]
        encoded = iter(self.format.encode([row for _, row in kept if not isinstance(row, RowError)]))
        for number, row in kept:
            if isinstance(row, RowError):
                yield EncodedRow(number, row)
                continue
            found = next(encoded)
            samples = self._checked([found] if isinstance(found, Sample) else found)
            warnings = tuple(self._odd(row))
            told = () if isinstance(samples, RowError) else (w for sample in samples for w in sample.warnings)
            self.warnings |= dict.fromkeys((*warnings, *told))
            yield EncodedRow(number, samples, warnings)

    def _belongs(self, row: Row | RowError) -> bool:
        if not self.source.eval_fraction:
            return True
        if isinstance(row, RowError):
            return self.source.part == "train"
        held_out = row_hash(row) < self.source.eval_fraction
        return held_out == (self.source.part == "eval")

    def _odd(self, row: Row) -> Iterator[str]:
        for name in sorted(row.keys() & self._watched):
            if row[name] not in (None, "", [], {}):
                why = "; only text is trained" if name in MEDIA else f" by the format {self.source.format}"
                yield f"the column {name!r} is not read{why}"
        for name in self._nullable:
            if look_up(row, name) is None:
                yield f"the column {name!r} of the template is null in some rows, which is an empty text"

    def _checked(self, samples: list[Sample] | RowError) -> list[Sample] | RowError:
        if isinstance(samples, RowError) or self._vocabulary is None:
            return samples
        for sample in samples:
            sides = [side.tokens for side in (sample, sample.rejected) if side is not None]
            largest = max(int(tokens.max(initial=0)) for tokens in sides)
            if largest >= self._vocabulary:
                return RowError(
                    f"the tokenizer gives the token {largest}, and the model has embeddings of {self._vocabulary:,} "
                    "tokens only: put the model's own tokenizer there; or, if tokens were added to it, call "
                    "model.resize_token_embeddings(len(tokenizer)) once, save both, and name that folder as model.path"
                )
        return samples


def row_hash(row: Row) -> float:
    """Returns a number in [0, 1) that depends on the row's contents alone."""
    text = json.dumps(row, sort_keys=True, ensure_ascii=False, default=str)
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
