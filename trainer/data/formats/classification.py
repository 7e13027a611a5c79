"""classification: one text or two, encoded as the tokenizer does it for its model, and the number of a label.

The only target is the last token, from which a decoder's head reads; so a step's target tokens count its samples. What
is too long is cut by the tokenizer, the longer text of two first, so that what it puts at the end stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from trainer.data.formats.columns import Columns, as_text
from trainer.data.label_names import label_name
from trainer.data.sample import Row, RowError, Sample
from trainer.data.spec import FrozenSource, PreparationSpec
from trainer.errors import InputError

Texts = tuple[str, str | None]


class ClassificationFormat:
    def __init__(self, source: FrozenSource, tokenizer: Any, spec: PreparationSpec) -> None:
        self.tokenizer, self.columns, self.length = tokenizer, Columns(source), spec.sequence_length
        if not spec.labels:
            raise InputError(
                f"data source {source.path}: classification needs the label set of the training data, and there is none"
            )
        self.numbers = {label: number for number, label in enumerate(spec.labels)}
        self.names = source.labels or spec.labels

    def encode(self, rows: Sequence[Row]) -> list[Sample | RowError]:
        texts, labels = [self._texts(row) for row in rows], [self._label(row) for row in rows]
        return [
            label
            if isinstance(label, RowError)
            else text
            if isinstance(text, RowError)
            else self._encode_one(text, label)
            for text, label in zip(texts, labels, strict=True)
        ]

    def _texts(self, row: Row) -> Texts | RowError:
        if self.columns.template is not None:
            text, pair = self.columns.filled(row, self.columns.template), None
        else:
            text, pair = self.columns.text(row, "text"), self.columns.optional(row, "text_pair")
        second = None if pair is None else as_text(pair, self.columns.names.get("text_pair", "text_pair"))
        if isinstance(text, RowError):
            return text
        return second if isinstance(second, RowError) else (text, second)

    def _label(self, row: Row) -> int | RowError:
        name = label_name(self.columns.value(row, "label"), self.names)
        if isinstance(name, RowError):
            return name
        if name in self.numbers:
            return self.numbers[name]
        return RowError(f"the label {name!r} is not one of those of the training data: {', '.join(self.numbers)}"[:300])

    def _encode_one(self, texts: Texts, label: int) -> Sample | RowError:
        out = self.tokenizer(*texts, return_attention_mask=False, verbose=False)
        truncated = len(out["input_ids"]) > self.length
        if truncated:
            out = self.tokenizer(*texts, return_attention_mask=False, truncation=True, max_length=self.length)
        tokens = np.array(out["input_ids"], dtype=np.int32)
        if not len(tokens):
            return RowError("there is no text, and the tokenizer adds nothing to it")
        types = np.array(out["token_type_ids"], dtype=np.int8) if "token_type_ids" in out else None
        target = np.arange(len(tokens)) == len(tokens) - 1
        return Sample(tokens, target, truncated, label=label, token_types=types)
