"""The evaluation data that ask for an answer in words: sources of questions, and the solutions of GSM8K.

The latter are known by their ``#### 42`` at the end, whether they stand as ``qa`` or as ``completion``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice

from trainer.data import FrozenSource
from trainer.data.formats.columns import Columns
from trainer.data.formats.completion import texts_of
from trainer.data.formats.qa import Example, example_of
from trainer.data.readers import rows_of
from trainer.data.sample import Row, RowError
from trainer.evaluate.answers import exact_match, f1, reference_number, same_number


@dataclass(frozen=True)
class Question:
    """``numeric``: the last number of the answer is what counts."""

    prompt: str
    answers: tuple[str, ...]
    numeric: bool

    def scores(self, prediction: str) -> dict[str, float]:
        if self.numeric:
            return {"accuracy": same_number(prediction, self.answers)}
        return {"exact_match": exact_match(prediction, self.answers), "f1": f1(prediction, self.answers)}


def questions_of(sources: Sequence[FrozenSource], limit: int | None) -> list[Question]:
    """The first ``limit`` questions of these sources, in their order. Rows that cannot be used are passed over: the
    preparation of the same data has counted them."""
    return list(islice(chain.from_iterable(map(_of_source, sources)), limit))


def _of_source(source: FrozenSource) -> Iterator[Question]:
    columns = Columns(source)
    if source.format == "qa":
        yield from (_question(*found) for row in rows_of(source) if (found := _asked(row, columns)))
    elif source.format == "completion":
        for row in rows_of(source):
            found = _completed(row, columns)
            if found is not None and reference_number(found.answers[0]) is None:
                return  # no row of GSM8K lacks it
            if found is not None:
                yield _question(*found)


def _asked(row: Row | RowError, columns: Columns) -> Example | None:
    found = row if isinstance(row, RowError) else example_of(row, columns)
    return None if isinstance(found, RowError) else found


def _completed(row: Row | RowError, columns: Columns) -> Example | None:
    texts = row if isinstance(row, RowError) else texts_of(row, columns)
    return None if isinstance(texts, RowError) else Example(texts[0], (texts[1],))


def _question(prompt: str, answers: tuple[str, ...]) -> Question:
    return Question(prompt, answers, reference_number(answers[0]) is not None)
