"""translation: a sentence in English and the same in French, which is the completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trainer.data.formats.columns import Columns
from trainer.data.formats.joined import Joiner, both
from trainer.data.sample import Row, RowError, Sample
from trainer.data.spec import FrozenSource, PreparationSpec


class Translation:
    def __init__(self, source: FrozenSource, tokenizer: Any, spec: PreparationSpec) -> None:
        self.joiner, self.columns = Joiner(tokenizer, "translation"), Columns(source)

    def encode(self, rows: Sequence[Row]) -> list[Sample | RowError]:
        pairs = [both(self.columns.text(row, "en"), self.columns.text(row, "fr")) for row in rows]
        return self.joiner.encode(
            [pair if isinstance(pair, RowError) else (f"{pair[0]}\nIn French:", f" {pair[1]}") for pair in pairs]
        )
