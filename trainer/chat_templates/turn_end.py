"""Finds what ends an assistant's turn in a chat template, so that generated texts end there too."""

from __future__ import annotations

from typing import Any, NamedTuple

from trainer.chat_templates.dialect import dialect_of
from trainer.chat_templates.rendering import render
from trainer.chat_templates.template import template_of


class TurnEnd(NamedTuple):
    """``tokens``: the special token that a template writes after a turn. ``strings``: the text that it writes there
    instead, which stops generation."""

    tokens: frozenset[int] = frozenset()
    strings: tuple[str, ...] = ()

    def cut(self, text: str) -> str:
        """Returns the text up to the first of the strings."""
        ends = [text.index(string) for string in self.strings if string in text]
        return text[: min(ends)] if ends else text

    def certain(self, text: str) -> str:
        """Returns the text without an end that may become one of the strings."""
        begun = (n for s in self.strings for n in range(len(s) - 1, 0, -1) if text.endswith(s[:n]))
        return text[: len(text) - max(begun, default=0)]


def turn_end(tokenizer: Any) -> TurnEnd:
    """Returns what the tokenizer's chat template writes after a turn; nothing if there is no template."""
    template = template_of(tokenizer)
    if not template:
        return TurnEnd()
    dialect = dialect_of(template, lambda messages, **how: render(tokenizer, messages, template, **how))
    if not dialect.turn_end:
        return TurnEnd()
    ids = tokenizer(dialect.turn_end.strip(), add_special_tokens=False)["input_ids"]
    if ids and ids[0] in tokenizer.added_tokens_decoder:
        return TurnEnd(tokens=frozenset(ids[:1]))
    return TurnEnd(strings=(dialect.turn_end,))
