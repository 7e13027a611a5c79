"""Compares a rendered conversation with its turns: a chat template must not leave out what is to be trained on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from trainer.chat_templates.dialect import thought_and_answer
from trainer.chat_templates.turn import Turn

Ranges = list[tuple[int, int]]


class LeftOut(NamedTuple):
    """A part of a turn that a text lacks. ``what``: the part's name; ``value``: its text."""

    turn: Turn
    what: str
    value: str

    def __str__(self) -> str:
        message = f"message {self.turn.number}" if self.turn.number else "the system text"
        return f"the chat template leaves out the {self.what} of {message} ({self.value.strip()!r:.60})"


def left_out(turn: Turn, text: str, start: int, *, reasoning: bool) -> LeftOut | int:
    """Returns what ``text`` lacks from ``start`` on of a turn, or the end of the turn's words there.

    ``reasoning``: the turn's reasoning is looked for too. No two things are found in the same place.
    """
    end = start
    # The longest first: a short one may stand in a longer one too.
    things = sorted(_things(turn, reasoning), key=lambda thing: -len(thing[1]))
    for number, (what, value) in enumerate(things, 1):
        found = find(value, text, start)
        if found is None:
            return LeftOut(turn, what, value)
        end = max([end, *(stop for _, stop in found)])
        for low, stop in found if number < len(things) else ():
            text = text[:low] + "\0" * (stop - low) + text[stop:]
    return end


def _things(turn: Turn, reasoning: bool) -> Iterator[tuple[str, str]]:
    thought, answer = thought_and_answer(turn)
    if reasoning and thought.strip():
        yield "reasoning_content", thought.strip()
    if answer.strip():
        yield "content", answer.strip()
    for call in turn.calls:
        yield "call", call.name
        for value in filter(None, leaves(call.arguments)):
            yield f"call of {call.name}, whose arguments hold this,", value.strip()


def leaves(value: Any) -> Iterator[str]:
    """Returns the values in a call's arguments at any depth, as text."""
    if isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from leaves(one)
    else:
        yield value if isinstance(value, str) else json.dumps(value)


def find(value: str, text: str, start: int) -> Ranges | None:
    """Returns where ``value`` stands in ``text``, from ``start`` on: as it is, as JSON writes it, or word by word."""
    for written in (value, json.dumps(value, ensure_ascii=False)[1:-1]):
        at = text.find(written, start)
        if at >= 0:
            return [(at, at + len(written))]
    found: Ranges = []
    for word in re.findall(r"\w+", value) or value.split():
        # As JSON and as Python write them.
        names = {"true": "[Tt]rue", "false": "[Ff]alse", "null": "null|None"}.get(word, re.escape(word))
        # A letter before it may belong to an escape: \n.
        match = re.compile(rf"(?:(?<!\w)|(?<=\\[ntr]))(?:{names})(?!\w)").search(text, start)
        if match is None:
            return None
        found.append(match.span())
        start = match.end()
    return found
