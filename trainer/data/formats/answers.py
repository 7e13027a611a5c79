"""Encodes answers to prompts that are given as texts or as turns of a conversation, with targets on the answer.

Texts are encoded as in completion. Turns are rendered by the chat template. They are given as a prompt and an answer,
each a turn, a list of turns, or text, or as ShareGPT's ``conversations`` and a turn. An answer that starts with a turn
of another role than the assistant's is the complete conversation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from trainer.data.formats.chat import MISSING, Conversation, chat_or_none
from trainer.data.formats.columns import Columns, as_text
from trainer.data.formats.joined import Joiner, Pair, both
from trainer.data.formats.turns import turns_of
from trainer.data.sample import Row, RowError, Sample
from trainer.data.spec import FrozenSource, PreparationSpec


class AnswerEncoder:
    def __init__(self, source: FrozenSource, tokenizer: Any, spec: PreparationSpec) -> None:
        self.joiner = Joiner(tokenizer, source.format, spec.special_tokens == "text")
        self.chat = chat_or_none(tokenizer, spec)
        self.columns = Columns(source)

    def encode(self, rows: Sequence[Row], column: str) -> list[Sample | RowError]:
        """Encodes the answers in one column: texts as one batch, conversations one by one."""
        parts = [self._read(row, column) for row in rows]
        joined = iter(self.joiner.encode([part for part in parts if not isinstance(part, Conversation)]))
        conversations = iter(self.chat.encode([part for part in parts if isinstance(part, Conversation)]))
        return [_single(next(conversations)) if isinstance(part, Conversation) else next(joined) for part in parts]

    def _read(self, row: Row, column: str) -> Pair | Conversation | RowError:
        sharegpt = "prompt" not in self.columns.names and "prompt" not in row and "conversations" in row
        prompt = row["conversations"] if sharegpt else self.columns.value(row, "prompt")
        answer = self.columns.value(row, column)
        if isinstance(answer, RowError):
            return answer
        if isinstance(prompt, str | RowError) and isinstance(answer, str):
            return both(as_text(prompt, "prompt"), as_text(answer, column))
        turns = turns_of(_listed(answer, "assistant"))
        if isinstance(turns, RowError):
            return turns
        if turns[0].role == "assistant":
            before = turns_of(prompt if isinstance(prompt, RowError) else _listed(prompt, "user"))
            if isinstance(before, RowError):
                return before
            turns = [*before, *(replace(turn, number=turn.number + len(before)) for turn in turns)]
        if not self.chat.template:
            return RowError(MISSING)
        if turns[-1].role != "assistant":
            return RowError(f"the conversation has to end with the assistant's answer, not with {turns[-1].role!r}")
        return Conversation(turns, last_only=True)


def _single(samples: list[Sample] | RowError) -> Sample | RowError:
    """Returns the sample of a conversation whose last turn alone is trained."""
    if isinstance(samples, RowError):
        return samples
    return samples[0] if samples else RowError("the answer is excluded from training, by its weight")


def _listed(value: Any, role: str) -> Any:
    """Returns a text or a single turn as a conversation of one turn; other values unchanged."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return [value] if isinstance(value, dict) else value
