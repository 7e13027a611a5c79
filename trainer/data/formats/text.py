"""text: a text as it stands, every token but the first a target, and eos at its end. One that is longer than
``sequence_length`` is cut into several samples, none of it lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from trainer.data.formats.columns import Columns
from trainer.data.formats.joined import eos_of
from trainer.data.sample import Row, RowError, Sample
from trainer.data.spec import FrozenSource, PreparationSpec


class TextFormat:
    def __init__(self, source: FrozenSource, tokenizer: Any, spec: PreparationSpec) -> None:
        del spec
        self.tokenizer, self.eos, self.columns = tokenizer, eos_of(tokenizer, "text"), Columns(source)

    def encode(self, rows: Sequence[Row]) -> list[Sample | RowError]:
        texts = [self.columns.text(row, "text") for row in rows]
        whole = [t for t in texts if not isinstance(t, RowError)]
        if not whole:
            return [t for t in texts if isinstance(t, RowError)]
        encoded = iter(self.tokenizer(whole, return_attention_mask=False, verbose=False)["input_ids"])
        return [t if isinstance(t, RowError) else self._sample(next(encoded)) for t in texts]

    def _sample(self, ids: list[int]) -> Sample:
        closed = ids if ids and ids[-1] == self.eos else [*ids, self.eos]
        tokens = np.array(closed, dtype=np.int32)
        return Sample(tokens, np.ones(len(tokens), dtype=np.bool_), splits=True)
