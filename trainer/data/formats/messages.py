"""messages: a conversation rendered by the tokenizer's chat template, targets on what the assistant says.

A template need not mark its generations. For the assistant's turn i, what the template makes of the turns before i with
a generation prompt has to be the beginning of what it makes of the turns up to i; the difference is what a model would
have generated. The whole conversation is tokenised at once; a token is a target when it starts inside a difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from trainer.data.formats import column_of, encodable
from trainer.data.rows import Encoded, Fault, Row
from trainer.data.spec import FrozenSource
from trainer.data.types import Bools
from trainer.errors import InputError

Turn = dict[str, Any]
Interval = tuple[int, int]


class Messages:
    def __init__(self, source: FrozenSource, tokenizer: Any, chat_template: str | None) -> None:
        self.tokenizer, self.template = tokenizer, chat_template or tokenizer.chat_template
        if not self.template:
            raise InputError(
                f"data source {source.path}: the format messages needs a chat template, and neither the tokenizer nor "
                "the recipe has one; set data.chat_template to a Jinja template or to the path of one"
            )
        self.column = source.columns.get("messages", "messages")

    def encode(self, rows: Sequence[Row]) -> list[Encoded | Fault]:
        return [self._encode_one(row) for row in rows]

    def _encode_one(self, row: Row) -> Encoded | Fault:
        turns = turns_of(column_of(row, self.column, "messages"))
        rendered = turns if isinstance(turns, Fault) else self._render_turns(turns)
        if isinstance(rendered, Fault):
            return rendered
        text, said = rendered
        checked = encodable(text)
        if isinstance(checked, Fault):
            return checked
        return self._encode_by_offsets(text, said) if self.tokenizer.is_fast else self._encode_by_parts(text, said)

    def _render_turns(self, turns: list[Turn]) -> tuple[str, list[Interval]] | Fault:
        """The conversation's text, and the character ranges that the assistant said."""
        from jinja2 import TemplateError

        said: list[Interval] = []
        before = ""
        try:
            for i, turn in enumerate(turns):
                if turn["role"] != "assistant":
                    continue
                opened = self._render(turns[:i], generation=True) if i else ""
                closed = self._render(turns[: i + 1], generation=False)
                if not opened.startswith(before) or not closed.startswith(opened):
                    return _not_a_prefix(i)
                said.append((len(opened), len(closed)))
                before = closed
            text = self._render(turns, generation=False)
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            return Fault(f"the chat template refuses the conversation: {error}")
        return (text, said) if text.startswith(before) else _not_a_prefix(len(turns) - 1)

    def _render(self, turns: list[Turn], generation: bool) -> str:
        text = self.tokenizer.apply_chat_template(
            turns, chat_template=self.template, tokenize=False, add_generation_prompt=generation
        )
        return str(text)

    def _encode_by_offsets(self, text: str, said: list[Interval]) -> Encoded:
        # The template writes the special tokens itself, BOS too.
        out = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False)
        offsets = np.array(out["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        return Encoded(np.array(out["input_ids"], dtype=np.int32), _within(offsets[:, 0], said))

    def _encode_by_parts(self, text: str, said: list[Interval]) -> Encoded | Fault:
        """Without offsets: the tokens of each beginning of the text have to begin the tokens of the whole."""
        tokens = self._ids(text)
        target = np.zeros(len(tokens), dtype=np.bool_)
        for start, stop in said:
            before, after = self._ids(text[:start]), self._ids(text[:stop])
            if tokens[: len(before)] != before or tokens[: len(after)] != after:
                return Fault(
                    "the tokenizer joins the assistant's words with what stands around them; use a fast tokenizer"
                )
            target[len(before) : len(after)] = True
        return Encoded(np.array(tokens, dtype=np.int32), target)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def turns_of(value: Any) -> list[Turn] | Fault:
    """A conversation's turns, checked: a list of mappings with a role. Keys without a value (parquet has them) go."""
    if isinstance(value, Fault):
        return value
    if not isinstance(value, list) or not value:
        return Fault(f"a conversation has to be a list of messages, not {type(value).__name__} ({value!r:.40})")
    for i, turn in enumerate(value):
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            return Fault(f"message {i + 1} has to be a mapping with role and content, not {turn!r:.60}")
    return [{k: v for k, v in turn.items() if v is not None} for turn in value]


def _within(starts: np.ndarray[Any, np.dtype[np.int64]], said: list[Interval]) -> Bools:
    target = np.zeros(len(starts), dtype=np.bool_)
    for low, high in said:
        target |= (starts >= low) & (starts < high)
    return target


def _not_a_prefix(turn: int) -> Fault:
    return Fault(
        f"the chat template renders the turns before message {turn + 1} differently when that message follows, so that "
        "the assistant's words cannot be told apart; name a template under data.chat_template that only ever appends"
    )
