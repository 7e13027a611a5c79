r"""qa: ``Question: …\nAnswer:``, a space and the answer. The frame is not added to a question that has it already.

The answer may be a list, and ``aliases`` may add more. The first is trained on; all of them are correct in evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from trainer.data.formats.columns import Columns, encodable
from trainer.data.formats.joined import Joiner
from trainer.data.sample import Row, RowError, Sample
from trainer.data.spec import FrozenSource, PreparationSpec

BEFORE, AFTER = "Question:", "Answer:"


class Example(NamedTuple):
    """A framed question, and all correct answers. The first answer is the one to train on."""

    prompt: str
    answers: tuple[str, ...]


class QuestionAnswer:
    def __init__(self, source: FrozenSource, tokenizer: Any, spec: PreparationSpec) -> None:
        self.joiner, self.columns = Joiner(tokenizer, "qa", spec.special_tokens == "text"), Columns(source)

    def encode(self, rows: Sequence[Row]) -> list[Sample | RowError]:
        examples = [example_of(row, self.columns) for row in rows]
        return self.joiner.encode([e if isinstance(e, RowError) else (e.prompt, f" {e.answers[0]}") for e in examples])


def example_of(row: Row, columns: Columns) -> Example | RowError:
    """Returns the row's question and answers; a RowError if there is no question or no answer."""
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
    r"""Returns the question without the frame ``Question: …\nAnswer:``, or without the end of it that it has."""
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
