"""Evaluation data that need a generated answer: sources of questions, and the solutions of GSM8K.

Solutions of GSM8K are recognised by their ``#### 42`` at the end, in the formats ``qa`` and ``completion``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice

from trainer.data import FrozenSource
from trainer.data.formats.columns import Columns
from trainer.data.formats.completion import texts_of
from trainer.data.formats.qa import example_of
from trainer.data.readers import rows_of
from trainer.data.sample import RowError
from trainer.evaluate.answers import exact_match, f1, reference_number, same_number


@dataclass(frozen=True)
class Question:
    """A question with its accepted answers. ``numeric``: only the last number of an answer counts."""

    prompt: str
    answers: tuple[str, ...]
    numeric: bool

    def scores(self, prediction: str) -> dict[str, float]:
        if self.numeric:
            return {"accuracy": same_number(prediction, self.answers)}
        return {"exact_match": exact_match(prediction, self.answers), "f1": f1(prediction, self.answers)}


def questions_of(sources: Sequence[FrozenSource], limit: int | None) -> list[Question]:
    """Returns the first ``limit`` questions of these sources, in their order. Unusable rows are skipped: the
    preparation of the same data has counted them."""
    return list(islice(chain.from_iterable(map(_of_source, sources)), limit))


def _of_source(source: FrozenSource) -> Iterator[Question]:
    columns = Columns(source)
    if source.format == "qa":
        for row in rows_of(source):
            found = row if isinstance(row, RowError) else example_of(row, columns)
            if not isinstance(found, RowError):
                yield _question(*found)
    elif source.format == "completion":
        for row in rows_of(source):
            texts = row if isinstance(row, RowError) else texts_of(row, columns)
            if isinstance(texts, RowError):
                continue
            if reference_number(texts[1]) is None:
                return  # not GSM8K, where every row has a number
            yield _question(texts[0], (texts[1],))


def _question(prompt: str, answers: tuple[str, ...]) -> Question:
    return Question(prompt, answers, reference_number(answers[0]) is not None)
