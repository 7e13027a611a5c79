"""A conversation rendered by a chat template, with targets on the assistant's turns.

The template need not mark the assistant's text. For the assistant's turn i, two texts are rendered: the turns before i
with a generation prompt, and the turns up to and including i. The first must be a prefix of the second; the rest is the
text that a model would have generated. The complete conversation is tokenised at once, and a token is a target if it
starts in such a rest.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from trainer.data.formats.columns import encodable
from trainer.data.formats.joined import eos_of
from trainer.data.formats.rendering import Unrendered, render
from trainer.data.formats.turns import Turn
from trainer.data.sample import RowError, Sample

Interval = tuple[int, int]
Tools = list[Any] | None


class Chat:
    """Encodes conversations. ``template`` replaces the tokenizer's own; None keeps that."""

    def __init__(self, tokenizer: Any, template: str | None) -> None:
        self.tokenizer, self.template = tokenizer, template or tokenizer.chat_template

    def encode(self, turns: list[Turn], tools: Tools = None, *, last_only: bool = False) -> Sample | RowError:
        """Encodes a conversation, with targets on all of the assistant's turns, or on the last one only."""
        rendered = self._render_turns(turns, tools, last_only)
        if isinstance(rendered, RowError):
            return rendered
        text, answers = rendered
        checked = encodable(text)
        if isinstance(checked, RowError):
            return checked
        encode = self._encode_by_offsets if self.tokenizer.is_fast else self._encode_by_parts
        return encode(text, answers)

    def ask(self, turns: list[Turn], tools: Tools = None) -> Sample | RowError:
        """Encodes a conversation that awaits the assistant's turn: it is the prompt, and the answer is eos alone."""
        try:
            text = encodable(self._render(turns, tools, generation=True))
        except Unrendered as error:
            return _refused(error)
        if isinstance(text, RowError):
            return text
        tokens = [*self._ids(text), eos_of(self.tokenizer, "messages")]
        target = np.zeros(len(tokens), dtype=np.bool_)
        target[-1] = True
        return Sample(np.array(tokens, dtype=np.int32), target)

    def _render_turns(self, turns: list[Turn], tools: Tools, last_only: bool) -> tuple[str, list[Interval]] | RowError:
        """Returns the conversation's text, and the character ranges of the assistant's turns."""
        answers: list[Interval] = []
        before = ""
        assistant = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
        try:
            for i in assistant[-1:] if last_only else assistant:
                opened = self._render(turns[:i], tools, generation=True) if i else ""
                closed = self._render(turns[: i + 1], tools, generation=False)
                if not opened.startswith(before) or not closed.startswith(opened):
                    return _not_a_prefix(i)
                answers.append((len(opened), len(closed)))
                before = closed
            text = self._render(turns, tools, generation=False)
        except Unrendered as error:
            return _refused(error)
        return (text, answers) if text.startswith(before) else _not_a_prefix(len(turns) - 1)

    def _render(self, turns: list[Turn], tools: Tools, generation: bool) -> str:
        return render(self.tokenizer, turns, self.template, tools=tools, add_generation_prompt=generation)

    def _encode_by_offsets(self, text: str, answers: list[Interval]) -> Sample:
        # The template writes the special tokens itself, BOS too.
        out = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False)
        starts = np.array(out["offset_mapping"], dtype=np.int64).reshape(-1, 2)[:, 0]
        target = np.zeros(len(starts), dtype=np.bool_)
        for low, high in answers:
            target |= (starts >= low) & (starts < high)
        return Sample(np.array(out["input_ids"], dtype=np.int32), target)

    def _encode_by_parts(self, text: str, answers: list[Interval]) -> Sample | RowError:
        """Encodes without offsets: the tokens of the text up to each edge of an answer must be a prefix of all
        tokens."""
        tokens = self._ids(text)
        target = np.zeros(len(tokens), dtype=np.bool_)
        for start, stop in answers:
            before, after = self._ids(text[:start]), self._ids(text[:stop])
            if tokens[: len(before)] != before or tokens[: len(after)] != after:
                return RowError(
                    "the tokenizer joins the assistant's words with the text around them; use a fast tokenizer"
                )
            target[len(before) : len(after)] = True
        return Sample(np.array(tokens, dtype=np.int32), target)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def _refused(error: Exception) -> RowError:
    return RowError(f"the chat template refuses the conversation: {error}")


def _not_a_prefix(turn: int) -> RowError:
    return RowError(
        f"the chat template renders the turns before message {turn + 1} differently when that message follows, so that "
        "the assistant's words cannot be identified; set data.chat_template to a template that only appends text"
    )
