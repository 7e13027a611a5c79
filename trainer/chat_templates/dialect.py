"""The dialect of a chat template: what it takes and writes. It is found by rendering short conversations with it.

Templates differ in what they read: contents as text or as parts, arguments as a mapping or as JSON text, reasoning in a
field or between ``<think>`` and ``</think>``. A template that does not read what it is given leaves it out, or writes
it as Python prints it, without an error. So each way is tried once per template, and the first that works is taken.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trainer.chat_templates.rendering import Unrendered
from trainer.chat_templates.turn import Call, Turn

Render = Callable[..., str]
"""``render(messages, **variables)`` returns a text, or raises Unrendered."""

ASKED, ANSWERED, THOUGHT, AGAIN = "QZASKED", "QZANSWERED", "QZTHOUGHT", "QZAGAIN"
CALLED = Call("qzcalled", {"qzkey": "QZVALUE"}, "call00000")
TOOL = {
    "type": "function",
    "function": {
        "name": "qztool",
        "description": "A probe.",
        "parameters": {"type": "object", "properties": {"qzkey": {"type": "string", "description": "A probe."}}},
    },
}
_INLINE = re.compile(r"\s*(?:<think>)?(.*?)</think>(.*)", re.DOTALL)
"""The tag that opens a thought may stand in the generation prompt, and so be missing."""


@dataclass(frozen=True)
class Dialect:
    """``parts``: contents are lists of parts. ``arguments_as_text``: a call's arguments are JSON text. ``empty``: a
    turn that only calls has the content "", otherwise none. ``developer``: the role is known. ``field``, ``inline``:
    reasoning is written that stands in a field, or in the content between ``<think>`` and ``</think>``. ``tools``:
    tools are written. ``short_ids``: ids of calls have to be 9 letters or digits.

    ``opening``: the generation prompt. ``before``: what stands before the words of a first question, ``after`` what
    follows an assistant's words at the end of a conversation, ``between`` what follows them before the next words of
    the user, and ``after_call`` what follows a call before its result."""

    parts: bool = False
    arguments_as_text: bool = False
    empty: bool = True
    developer: bool = False
    field: bool = False
    inline: bool = False
    think_tags: bool = False
    tools: bool = False
    opening: str = ""
    before: str = ""
    after: str = ""
    between: str = ""
    after_call: str = ""
    short_ids: bool = False

    @property
    def turn_end(self) -> str:
        """The text that ends an assistant's turn."""
        return (self.after if self.after.strip() else self.between).rstrip()

    def messages(self, turns: Sequence[Turn]) -> list[dict[str, Any]]:
        """Returns the turns as the template takes them."""
        return [self._message(turn) for turn in turns]

    def _message(self, turn: Turn) -> dict[str, Any]:
        content, reasoning = self._placed(turn)
        message = dict(turn.more)
        if "tool_call_id" in message:
            message["tool_call_id"] = self._id(message["tool_call_id"])
        message["role"] = "system" if turn.role == "developer" and not self.developer else turn.role
        if content or not turn.calls or self.empty:
            message["content"] = [{"type": "text", "text": content}] if self.parts else content
        if reasoning:
            # gpt-oss reads thinking, most others reasoning_content.
            message |= {"reasoning_content": reasoning, "thinking": reasoning}
        if turn.calls:
            message["tool_calls"] = [self._call(call) for call in turn.calls]
        return message

    def _placed(self, turn: Turn) -> tuple[str, str]:
        """Returns the content and the field of reasoning, with the reasoning where the template writes it from."""
        if turn.reasoning and not self.field and self.inline and self.think_tags:
            return f"<think>\n{turn.reasoning}\n</think>\n\n{turn.content}", ""
        if self.field and not turn.reasoning and turn.role == "assistant":
            reasoning, content = thought_and_answer(turn)
            return content, reasoning
        return turn.content, turn.reasoning

    def _call(self, call: Call) -> dict[str, Any]:
        arguments = json.dumps(call.arguments, ensure_ascii=False) if self.arguments_as_text else call.arguments
        return {"id": self._id(call.id), "type": "function", "function": {"name": call.name, "arguments": arguments}}

    def _id(self, given: Any) -> str:
        fits = not self.short_ids or re.fullmatch("[a-zA-Z0-9]{9}", str(given))
        return str(given) if fits else hashlib.sha256(str(given).encode()).hexdigest()[:9]


def thought_and_answer(turn: Turn) -> tuple[str, str]:
    """Returns the reasoning of a turn, from its field or from the tags in its content, and the content without it."""
    found = None if turn.reasoning else _INLINE.fullmatch(turn.content)
    return (turn.reasoning, turn.content) if found is None else (found[1].strip(), found[2].strip())


def dialect_of(template: str, render: Render) -> Dialect:
    """Returns what the template takes. What it refuses in every way keeps the default, so that rows say why."""
    ask, answer = Turn(1, "user", ASKED), Turn(2, "assistant", ANSWERED)
    call, think = replace(answer, content="", calls=(CALLED,)), replace(answer, reasoning=THOUGHT)
    inline = replace(answer, content=f"<think>\n{THOUGHT}\n</think>\n\n{ANSWERED}")
    known = Dialect(think_tags="</think>" in template)

    def text(dialect: Dialect, *turns: Turn, **how: Any) -> str:
        try:
            return render(dialect.messages(turns), **how)
        except Unrendered:
            return ""

    def first(choices: Sequence[Dialect], works: Callable[[Dialect], bool]) -> Dialect:
        return next(filter(works, choices), choices[0])

    def calls(dialect: Dialect) -> bool:
        written = text(dialect, ask, call)
        as_python, twice = "'qzkey'" in written, '\\"qzkey' in written
        return all(word in written for word in ("qzcalled", "qzkey", "QZVALUE")) and not as_python and not twice

    def writes(dialect: Dialect) -> bool:
        return all(word in text(dialect, ask, answer) for word in (ASKED, ANSWERED))

    known = first([known, replace(known, parts=True)], writes)
    if not writes(known):
        return known  # a template that takes no conversation, or never ends
    ways = [(as_text, empty) for as_text in (False, True) for empty in (True, False)]
    known = first([replace(known, arguments_as_text=a, empty=e) for a, e in ways], calls)
    long_id = replace(call, calls=(replace(CALLED, id="call_" + "0" * 24),))
    known = replace(known, short_ids=calls(known) and not text(known, ask, long_id))
    known = replace(
        known,
        field=THOUGHT in text(replace(known, field=True), ask, think),
        inline=THOUGHT in text(replace(known, inline=True), ask, inline),
        tools="qztool" in text(known, ask, answer, tools=[TOOL]),
        developer="developer" in template
        and AGAIN in text(replace(known, developer=True), Turn(0, "developer", AGAIN), ask, answer),
    )
    result = Turn(3, "tool", AGAIN, more={"tool_call_id": CALLED.id, "name": CALLED.name})
    called, resulting = text(known, ask, call), text(known, ask, call, result)
    closed, more = text(known, ask, answer), text(known, ask, answer, Turn(3, "user", AGAIN))
    opened, asked = text(known, ask, add_generation_prompt=True), text(known, ask)
    return replace(
        known,
        opening=opened[len(asked) :] if opened.startswith(asked) else "",
        before=asked.partition(ASKED)[0],
        after=closed.rpartition(ANSWERED)[2],
        after_call=resulting[len(called) :].partition(AGAIN)[0] if called and resulting.startswith(called) else "",
        between=more.partition(ANSWERED)[2].partition(AGAIN)[0],
    )
