"""messages: a conversation rendered by the chat template, with the loss on the assistant's turns.

Turns of tools are kept, and a row's ``tools`` are passed to the template. In task ppo, a conversation that does not end
with the assistant's turn is a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trainer.data.formats.chat import Chat
from trainer.data.formats.columns import Columns
from trainer.data.formats.turns import tools_of, turns_of
from trainer.data.sample import Row, RowError, Sample
from trainer.data.spec import FrozenSource, PreparationSpec
from trainer.errors import InputError
from trainer.recipe.tasks import TASKS


class MessagesFormat:
    def __init__(self, source: FrozenSource, tokenizer: Any, spec: PreparationSpec) -> None:
        self.chat, self.columns = Chat(tokenizer, spec.chat_template), Columns(source)
        self.of_prompts = TASKS[spec.task].generates
        if not self.chat.template:
            raise InputError(
                f"data source {source.path}: the format messages needs a chat template, and neither the tokenizer nor "
                "the recipe has one; set data.chat_template to a Jinja template or to the path of one"
            )

    def encode(self, rows: Sequence[Row]) -> list[Sample | RowError]:
        return [self._encode_one(row) for row in rows]

    def _encode_one(self, row: Row) -> Sample | RowError:
        turns, tools = turns_of(self.columns.value(row, "messages")), tools_of(self.columns.optional(row, "tools"))
        if isinstance(turns, RowError):
            return turns
        if isinstance(tools, RowError):
            return tools
        if self.of_prompts and turns[-1]["role"] != "assistant":
            return self.chat.ask(turns, tools)
        return self.chat.encode(turns, tools)
