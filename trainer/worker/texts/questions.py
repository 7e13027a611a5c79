"""Questions of the evaluation data: prompts framed as in training, with their accepted answers.

A question is a sample of the prepared data: the tokens before its last trained answer, and that answer. The prepared
data have the first answer only; other accepted ones (format ``qa``) are read from the source's rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.artifacts.chat import first_line, one_line
from trainer.chat_templates.turn_end import TurnEnd, turn_end
from trainer.data import Batch, FrozenSource, PreparedDataset, eval_batches
from trainer.data.formats.columns import Columns
from trainer.data.formats.qa import example_of
from trainer.data.readers import open_reader
from trainer.data.sample import RowError
from trainer.errors import InputError, MusterError
from trainer.recipe.formats import FORMATS
from trainer.tasks.answers import reference_number, solution, solved
from trainer.tasks.sampling import prompts_of

if TYPE_CHECKING:
    from trainer.data import DiskCache

READ_AT_ONCE = 64
QA = "qa"
NO_END = TurnEnd()


@dataclass(frozen=True)
class Question:
    """``tokens``: the prompt's; ``prompt``: its text. ``answers``: the accepted ones, that of the sample first.
    ``line``: the answer is the first line of a text (format ``qa``). ``end``: what ends an answer in a chat."""

    sample_id: str
    tokens: tuple[int, ...]
    prompt: str
    answers: tuple[str, ...]
    line: bool = False
    end: TurnEnd = NO_END

    @property
    def numeric(self) -> bool:
        """True for a question whose answer is a solution of GSM8K."""
        return reference_number(self.answers[0]) is not None

    def answer(self, text: str) -> str:
        """Returns the answer in a generated text."""
        text = self.end.cut(text)
        return solution(text) if self.numeric else first_line(text) if self.line else text.strip()

    def ended(self, text: str) -> bool:
        """Returns True if the answer in the text so far is complete."""
        if self.end.cut(text) != text:
            return True
        return solved(text) if self.numeric else self.line and one_line(text)


@dataclass(frozen=True)
class QuestionReader:
    """Reads questions from prepared evaluation data."""

    data: PreparedDataset
    tokenizer: Any
    cache: DiskCache | None = None

    def first(self, count: int | None, longest: int | None, wanted: Callable[[Question], bool]) -> list[Question]:
        """Returns the first ``count`` questions that are ``wanted`` and have at most ``longest`` tokens. A sample that
        may be cut is left out, since its answer would be incomplete.

        Raises InputError if the rows of a source with several accepted answers cannot be read."""
        batches = eval_batches(self.data, READ_AT_ONCE, 0, 1, cache=self.cache, singly=True)
        questions = chain.from_iterable(map(self._of_batch, batches))
        found = (q for q in questions if wanted(q) and (longest is None or len(q.tokens) <= longest))
        return self._with_accepted(list(islice(found, count)))

    def source_of(self, question: Question) -> FrozenSource:
        return self.data.spec.sources[_place(question)[0]]

    def _of_batch(self, batch: Batch) -> Iterator[Question]:
        chats, sources = turn_end(self.tokenizer), self.data.spec.sources
        for row, prompt in enumerate(prompts_of(batch)):
            source = sources[int(prompt.sample_id.partition(":")[0])]
            length = int((batch.position_ids[row] == np.arange(batch.position_ids.shape[1])).sum())
            # A pair may be two samples, of which one has the answer that was not preferred.
            asks = FORMATS[source.format].asks and (not batch.desirable.size or bool(batch.desirable[row]))
            line = source.format == QA
            chat = FORMATS[source.format].chats or source.style == "chat"
            text = chats.cut(self._text(prompt.answer)) if chat else self._text(prompt.answer)
            if asks and text.strip() and length < self.data.spec.sequence_length:
                answers, end = (text.strip(),), chats if chat else NO_END
                yield Question(prompt.sample_id, tuple(prompt.tokens), self._text(prompt.tokens), answers, line, end)

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _with_accepted(self, questions: Sequence[Question]) -> list[Question]:
        """Adds the accepted answers that the prepared data lack."""
        wanted: dict[tuple[int, int], set[int]] = {}
        for question in questions:
            if question.line:
                source, obj, row = _place(question)
                wanted.setdefault((source, obj), set()).add(row)
        accepted = {
            (source, obj, row): answers
            for (source, obj), rows in wanted.items()
            for row, answers in self._accepted(self.data.spec.sources[source], obj, rows).items()
        }
        return [replace(q, answers=accepted[_place(q)]) if q.line else q for q in questions]

    def _accepted(self, source: FrozenSource, obj: int, rows: set[int]) -> Mapping[int, tuple[str, ...]]:
        frozen, found, columns = source.objects[obj], dict[int, tuple[str, ...]](), Columns(source)
        try:
            reader = open_reader(source, frozen)
            for piece in reader.cut():
                if not any(piece.start <= row < piece.stop for row in rows):
                    continue
                for place, row in reader.rows(piece.start, piece.stop):
                    example = example_of(row, columns) if place in rows and not isinstance(row, RowError) else None
                    if example is not None and not isinstance(example, RowError):
                        found[place] = example.answers
        except (MusterError, OSError) as error:
            raise self._unreadable(frozen.url, str(error)) from error
        if found.keys() != rows:
            raise self._unreadable(frozen.url, "its rows are not those that were prepared")
        return found

    def _unreadable(self, url: str, cause: str) -> InputError:
        return InputError(
            f"the accepted answers of {url} cannot be read ({cause}); put the file where the workers can read it, or "
            "train with generative_eval.count=0"
        )


def _place(question: Question) -> tuple[int, int, int]:
    """Returns source, object and row of the question's sample (`trainer.data.blocks.sample_id`)."""
    source, _, rest = question.sample_id.partition(":")
    obj, _, row = rest.partition("/")
    return int(source), int(obj), int(row.partition("+")[0].partition("#")[0])
