r"""qa: ``Question: …\nAnswer:`` and a space and the answer; a text that has the frame already keeps one.

The answer may be a list, and ``aliases`` may add to it: the first is trained on, all of them count in evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from trainer.data.formats.columns import Columns, encodable
from trainer.data.formats.joined import Joiner, Pair
from trainer.data.sample import Row, RowError, Sample
from trainer.data.spec import FrozenSource, PreparationSpec

BEFORE, AFTER = "Question:", "Answer:"


class Example(NamedTuple):
    """A question as the model is asked it, and every answer that is right, the first being the one to train on."""

    prompt: str
    answers: tuple[str, ...]


class QuestionAnswer:
    def __init__(self, source: FrozenSource, tokenizer: Any, spec: PreparationSpec) -> None:
        del spec
        self.joiner, self.columns = Joiner(tokenizer, "qa"), Columns(source)

    def encode(self, rows: Sequence[Row]) -> list[Sample | RowError]:
        return self.joiner.encode([_pair_of(example_of(row, self.columns)) for row in rows])


def example_of(row: Row, columns: Columns) -> Example | RowError:
    """What evaluation asks and accepts; a Fault when there is no question or no answer."""
    question, first = columns.text(row, "question"), columns.value(row, "answer")
    more = columns.optional(row, "aliases")
    for part in (question, first, more):
        if isinstance(part, RowError):
            return part
    answers = [*_answers(first), *_answers(more)]
    wrong = [a for a in answers if isinstance(a, RowError)]
    if wrong:
        return wrong[0]
    texts = [a for a in answers if isinstance(a, str)]
    if not texts:
        return RowError(f"there is no answer ({first!r:.40}); every question needs one")
    assert isinstance(question, str)
    return Example(framed(question), tuple(dict.fromkeys(texts)))


def framed(question: str) -> str:
    return f"{BEFORE} {unframed(question)}\n{AFTER}"


def unframed(question: str) -> str:
    r"""The question alone, where the text is ``Question: …\nAnswer:`` already or has one end of it."""
    text = question.strip()
    return text.removeprefix(BEFORE).removesuffix(AFTER).strip()


def _answers(value: Any) -> list[str | RowError]:
    if value is None:
        return []
    if isinstance(value, list):
        return [answer for one in value for answer in _answers(one)]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return [RowError(f"an answer has to be text or a list of texts, not {type(value).__name__} ({value!r:.40})")]
    text = str(value).strip()
    return [encodable(text)] if text else []


def _pair_of(example: Example | RowError) -> Pair | RowError:
    return example if isinstance(example, RowError) else (example.prompt, f" {example.answers[0]}")
