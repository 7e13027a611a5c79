"""The contract of a format: an answer for each row, in the rows' order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trainer.data.formats import open_format, plugin_code
from trainer.data.sample import RowError, Sample
from trainer.data.spec import FrozenSource, PreparationSpec


def check_rows(name: str, row: Mapping[str, Any], tokenizer: Any) -> None:
    """``row``: one that the format takes. Raises AssertionError."""
    source = FrozenSource("rows.jsonl", name, (), code=plugin_code(name))
    form = open_format(source, tokenizer, PreparationSpec((source,), "tokenizer", 64, labels=("no", "yes")))
    first, fault, last = form.encode([dict(row), {"other": 1}, dict(row)])
    assert isinstance(fault, RowError), f"{fault}: a row without the format's columns is a fault"
    assert fault.reason
    for sample in (*_samples(first), *_samples(last)):
        for side in (sample, *([sample.rejected] if sample.rejected else [])):
            assert side.tokens.dtype == np.int32
            assert side.target.dtype == np.bool_
            assert len(side.tokens) == len(side.target)
            assert side.target.any(), "nothing would be learned from it"
    assert [list(s.tokens) for s in _samples(first)] == [list(s.tokens) for s in _samples(last)]
    assert list(form.encode([])) == []


def _samples(answer: Sample | Sequence[Sample] | RowError) -> Sequence[Sample]:
    assert not isinstance(answer, RowError), answer.reason
    return [answer] if isinstance(answer, Sample) else answer
