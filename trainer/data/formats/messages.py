"""messages: a conversation rendered by the chat template, with the loss on the assistant's turns.

A row holds it in ``messages`` or ``conversations``. Turns of tools are kept, and a row's ``tools`` are passed to the
template; its ``system`` text becomes the first turn. In task ppo, a conversation that does not end with the assistant's
turn is a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trainer.data.formats.chat import Chat, Conversation, chat_of
from trainer.data.formats.columns import Columns, column_of
from trainer.data.formats.turns import tools_of, turns_of
from trainer.data.sample import Row, RowError, Sample
from trainer.data.spec import FrozenSource, PreparationSpec
from trainer.recipe.tasks import TASKS

COLUMNS = ("messages", "conversations", "conversation")


class MessagesFormat:
    def __init__(self, source: FrozenSource, tokenizer: Any, spec: PreparationSpec) -> None:
        self.chat, self.columns = chat_of(source, tokenizer, spec), Columns(source)
        self.last_only, self.of_prompts = source.train_on == "last", TASKS[spec.task].generates

    def encode(self, rows: Sequence[Row]) -> list[Sample | list[Sample] | RowError]:
        return encode_conversations(self.chat, [self._read(row) for row in rows], self.of_prompts)

    def _read(self, row: Row) -> Conversation | RowError:
        name = self.columns.names.get("messages") or next((c for c in COLUMNS if row.get(c) is not None), "messages")
        turns = turns_of(column_of(row, name, "messages"), self.columns.optional(row, "system"))
        tools = tools_of(self.columns.optional(row, "tools"))
        if isinstance(turns, RowError):
            return turns
        return tools if isinstance(tools, RowError) else Conversation(turns, tools, self.last_only)


def encode_conversations(
    chat: Chat, read: Sequence[Conversation | RowError], of_prompts: bool
) -> list[Sample | list[Sample] | RowError]:
    """Encodes conversations; if only prompts are needed (``of_prompts``), those that await an answer are prompts."""
    asked = [of_prompts and isinstance(c, Conversation) and c.turns[-1].role != "assistant" for c in read]
    answered = iter(chat.encode([c for c, asks in zip(read, asked, strict=True) if not asks]))
    return [
        chat.ask(c) if asks and isinstance(c, Conversation) else next(answered)
        for c, asks in zip(read, asked, strict=True)
    ]
