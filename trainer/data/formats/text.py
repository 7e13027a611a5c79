"""text: a text without a template and with eos at its end; every token except the first is a target.

A text longer than ``sequence_length`` is cut into several samples, so that no token is lost.
"""

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
        samples = []
        for ids in self.tokenizer(whole, return_attention_mask=False, verbose=False)["input_ids"]:
            closed = ids if ids and ids[-1] == self.eos else [*ids, self.eos]
            tokens = np.array(closed, dtype=np.int32)
            samples.append(Sample(tokens, np.ones(len(tokens), dtype=np.bool_), splits=True))
        encoded = iter(samples)
        return [t if isinstance(t, RowError) else next(encoded) for t in texts]
