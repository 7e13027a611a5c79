"""Compares a rendered conversation with its turns: a chat template must not leave out what is to be trained on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from trainer.chat_templates.dialect import thought_and_answer
from trainer.chat_templates.turn import Turn


class LeftOut(NamedTuple):
    """What a text lacks of a turn: ``what`` names it, ``value`` is it."""

    turn: Turn
    what: str
    value: str

    def __str__(self) -> str:
        message = f"message {self.turn.number}" if self.turn.number else "the system text"
        return f"the chat template leaves out the {self.what} of {message} ({self.value.strip()!r:.60})"


def left_out(turn: Turn, text: str, start: int, *, reasoning: bool) -> LeftOut | int:
    """Returns what ``text`` lacks from ``start`` on of a turn, or the end of the turn's words there.

    ``reasoning``: the turn's reasoning is looked for too.
    """
    end = start
    for what, value in _things(turn, reasoning):
        found = find_end(value, text, start)
        if found is None:
            return LeftOut(turn, what, value)
        end = max(end, found)
    return end


def _things(turn: Turn, reasoning: bool) -> Iterator[tuple[str, str]]:
    thought, answer = thought_and_answer(turn)
    if reasoning:
        yield "reasoning_content", thought
    yield "content", answer
    for call in turn.calls:
        yield "call", call.name
        for value in leaves(call.arguments):
            yield f"call of {call.name}, whose arguments hold this,", value


def leaves(value: Any) -> Iterator[str]:
    """Returns the values in a call's arguments at any depth, as text."""
    if isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from leaves(one)
    else:
        yield value if isinstance(value, str) else json.dumps(value)


def find_end(value: str, text: str, start: int) -> int | None:
    """Returns where ``value`` ends in ``text``, from ``start`` on: as it is, as JSON writes it, or word by word."""
    value = value.strip()
    at = text.find(value, start)
    if at >= 0:
        return at + len(value)
    escaped = json.dumps(value, ensure_ascii=False)[1:-1]
    at = text.find(escaped, start)
    if at >= 0:
        return at + len(escaped)
    for word in re.findall(r"\w+", value) or value.split():
        at = text.find(word, start)
        if at < 0 and word in ("true", "false", "null"):  # as Python writes them
            word = {"true": "True", "false": "False", "null": "None"}[word]
            at = text.find(word, start)
        if at < 0:
            return None
        start = at + len(word)
    return start
