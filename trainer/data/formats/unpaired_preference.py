"""unpaired_preference: a prompt, an answer (`trainer.data.formats.answers`), and a label: true for a good answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from trainer.data.formats.answers import AnswerEncoder
from trainer.data.sample import Row, RowError, Sample
from trainer.data.spec import FrozenSource, PreparationSpec


class UnpairedPreference:
    def __init__(self, source: FrozenSource, tokenizer: Any, spec: PreparationSpec) -> None:
        self.answers = AnswerEncoder(source, tokenizer, spec)

    def encode(self, rows: Sequence[Row]) -> list[Sample | RowError]:
        samples = self.answers.encode(rows, "completion")
        return [self._labelled(row, sample) for row, sample in zip(rows, samples, strict=True)]

    def _labelled(self, row: Row, sample: Sample | RowError) -> Sample | RowError:
        label = self.answers.columns.value(row, "label")
        for part in (sample, label):
            if isinstance(part, RowError):
                return part
        if label not in (True, False):  # 1 and 0 as well
            return RowError(f"the label has to be true (a good answer) or false, not {label!r:.40}")
        assert isinstance(sample, Sample)
        return replace(sample, desirable=bool(label))
