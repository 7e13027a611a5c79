"""A conversation rendered by a chat template, targets on what the assistant says.

A template need not mark its generations. For the assistant's turn i, what the template makes of the turns before i with
a generation prompt has to be the beginning of what it makes of the turns up to i; the difference is what a model would
have generated. The whole conversation is tokenised at once; a token is a target when it starts inside a difference.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from trainer.data.formats.columns import encodable
from trainer.data.formats.joined import eos_of
from trainer.data.formats.rendering import Unrendered, render
from trainer.data.formats.turns import Turn
from trainer.data.sample import RowError, Sample
from trainer.data.types import Bools

Interval = tuple[int, int]
Tools = list[Any] | None


TEMPLATE_FAULTS = (TypeError, LookupError, ValueError, ArithmeticError, AttributeError, RecursionError)
"""What a template raises beside its own errors, for turns that hold what its author did not think of."""


class Chat:
    """``template`` takes the place of the tokenizer's own."""

    def __init__(self, tokenizer: Any, template: str | None) -> None:
        self.tokenizer, self.template = tokenizer, template or tokenizer.chat_template

    def encode(self, turns: list[Turn], tools: Tools = None, *, last_only: bool = False) -> Sample | RowError:
        """Targets on all of the assistant's turns, or on the last one only."""
        rendered = self._render_turns(turns, tools, last_only)
        if isinstance(rendered, RowError):
            return rendered
        text, said = rendered
        checked = encodable(text)
        if isinstance(checked, RowError):
            return checked
        return self._encode_by_offsets(text, said) if self.tokenizer.is_fast else self._encode_by_parts(text, said)

    def ask(self, turns: list[Turn], tools: Tools = None) -> Sample | RowError:
        """A conversation that waits for the assistant: its opening is the prompt, and the answer the end of text."""
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
        """The conversation's text, and the character ranges that the assistant said."""
        said: list[Interval] = []
        before = ""
        spoken = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
        try:
            for i in spoken[-1:] if last_only else spoken:
                opened = self._render(turns[:i], tools, generation=True) if i else ""
                closed = self._render(turns[: i + 1], tools, generation=False)
                if not opened.startswith(before) or not closed.startswith(opened):
                    return _not_a_prefix(i)
                said.append((len(opened), len(closed)))
                before = closed
            text = self._render(turns, tools, generation=False)
        except Unrendered as error:
            return _refused(error)
        return (text, said) if text.startswith(before) else _not_a_prefix(len(turns) - 1)

    def _render(self, turns: list[Turn], tools: Tools, generation: bool) -> str:
        return render(self.tokenizer, turns, self.template, tools=tools, add_generation_prompt=generation)

    def _encode_by_offsets(self, text: str, said: list[Interval]) -> Sample:
        # The template writes the special tokens itself, BOS too.
        out = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False)
        offsets = np.array(out["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        return Sample(np.array(out["input_ids"], dtype=np.int32), _within(offsets[:, 0], said))

    def _encode_by_parts(self, text: str, said: list[Interval]) -> Sample | RowError:
        """Without offsets: the tokens of each beginning of the text have to begin the tokens of the whole."""
        tokens = self._ids(text)
        target = np.zeros(len(tokens), dtype=np.bool_)
        for start, stop in said:
            before, after = self._ids(text[:start]), self._ids(text[:stop])
            if tokens[: len(before)] != before or tokens[: len(after)] != after:
                return RowError(
                    "the tokenizer joins the assistant's words with what stands around them; use a fast tokenizer"
                )
            target[len(before) : len(after)] = True
        return Sample(np.array(tokens, dtype=np.int32), target)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def _within(starts: np.ndarray[Any, np.dtype[np.int64]], said: list[Interval]) -> Bools:
    target = np.zeros(len(starts), dtype=np.bool_)
    for low, high in said:
        target |= (starts >= low) & (starts < high)
    return target


def _refused(error: Exception) -> RowError:
    return RowError(f"the chat template refuses the conversation: {error}")


def _not_a_prefix(turn: int) -> RowError:
    return RowError(
        f"the chat template renders the turns before message {turn + 1} differently when that message follows, so that "
        "the assistant's words cannot be told apart; name a template under data.chat_template that only ever appends"
    )
