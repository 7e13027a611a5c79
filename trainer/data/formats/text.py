"""text: a text without a template and with eos at its end; every token except the first is a target.

A text longer than ``sequence_length`` is cut into several samples, so that no token is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from trainer.data.formats.columns import Columns
from trainer.data.formats.tokens import Ends, tokenise
from trainer.data.sample import Row, RowError, Sample
from trainer.data.spec import FrozenSource, PreparationSpec


class TextFormat:
    def __init__(self, source: FrozenSource, tokenizer: Any, spec: PreparationSpec) -> None:
        self.tokenizer, self.ends, self.columns = tokenizer, Ends.of(tokenizer, "text"), Columns(source)
        self.literal = spec.special_tokens == "text"

    def encode(self, rows: Sequence[Row]) -> list[Sample | RowError]:
        texts = [self.columns.text(row, "text") for row in rows]
        whole = [t for t in texts if not isinstance(t, RowError)]
        encoded = iter(tokenise(self.tokenizer, whole, special=True, literal=self.literal))
        return [
            t if isinstance(t, RowError) else replace(self.ends.closed(next(encoded).ids, 0), splits=True)
            for t in texts
        ]
