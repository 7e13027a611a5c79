"""The tokens of an environment's answer, as they stand between two turns of the model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from trainer.chat_templates.dialect import ANSWERED, ASKED, CALLED, THOUGHT, dialect_of
from trainer.chat_templates.rendering import Unrendered, render
from trainer.chat_templates.template import template_of
from trainer.chat_templates.turn import Turn
from trainer.data.formats.tokens import Marks, tokenise
from trainer.errors import InputError, RewardFailed
from trainer.recipe import Recipe

log = logging.getLogger(__name__)

PROBE = "QZRESULT"
ROLES = ("tool", "user")
"""The roles of an answer, the first one first that the chat template writes."""


class PlainDialogue:
    """Puts an answer as it is, for rows that are no chats. ``literal``: what looks like a special token is text."""

    def __init__(self, tokenizer: Any, *, literal: bool) -> None:
        self._tokenizer, self._literal = tokenizer, literal

    def answer(self, text: str, turn: Sequence[int], *, ended: bool) -> list[int]:
        # SentencePiece begins a text with a space; so the text stands behind something that does not join with it.
        before = "x" if text[:1].isspace() else "\n"
        (made,) = tokenise(self._tokenizer, [before + text], special=False, literal=self._literal)
        return made.ids[made.span((1, len(made.text)))] if text else []


class ChatDialogue:
    """Puts an answer as the chat template does: with all that it writes between two turns of the assistant.

    That is found with a conversation of its own in place of the text's, which is never tokenised again. So the template
    must leave the assistant's words as they are once another turn follows."""

    def __init__(self, tokenizer: Any, template: str | None, *, literal: bool) -> None:
        """Raises InputError for a template that rewrites earlier turns, or writes no turn after an assistant's."""
        self._tokenizer = tokenizer
        self._marks = Marks(tokenizer) if literal else None
        if not template:
            raise InputError("an environment of chats needs a chat template; set data.chat_template")
        self._template = template
        self._dialect = dialect_of(template, lambda messages, **how: render(tokenizer, messages, template, **how))
        self._end = self._dialect.turn_end.strip()
        self.role, self._before = self._probed()

    def answer(self, text: str, turn: Sequence[int], *, ended: bool) -> list[int]:
        try:
            whole = self._render(text, self.role)
        except Unrendered as error:
            raise RewardFailed(f"the chat template refuses the environment's answer {text!r:.100}: {error}") from error
        start = whole.index(ANSWERED) + len(ANSWERED)
        at = whole.find(self._end, start) if self._end else -1
        # The model has written the end of its turn itself, unless a `stop` string of the recipe ended it.
        tail = self._tokenizer.decode(turn[-2 * len(self._end.encode()) - 4 :])
        if at >= 0 and not whole[start:at].strip() and (ended or self._end in tail):
            start = at + len(self._end)
        ids = self._tokens(whole, start)
        # Some templates end a turn with the mark of the next one, which the model has written then.
        return ids[1:] if ended and ids[:1] == list(turn[-1:]) else ids

    def _tokens(self, whole: str, start: int) -> list[int]:
        """Returns the tokens of what stands in the text from a character on."""
        span = start, len(whole)
        if self._marks is not None:
            marked = self._marks.tokenise(whole)
            return marked.ids[marked.span(span)]
        (made,) = tokenise(self._tokenizer, [whole], special=False)
        return made.ids[made.span(span)]

    def _render(self, text: str, role: str, before: Turn | None = None) -> str:
        more = {"tool_call_id": CALLED.id, "name": CALLED.name} if role == "tool" else {}
        answer = Turn(3, role, text, more=more)
        if self._marks is not None:
            answer = self._marks.mark_turn(answer)
        messages = self._dialect.messages([Turn(1, "user", ASKED), before or self._before, answer])
        return render(self._tokenizer, messages, self._template, add_generation_prompt=True)

    def _probed(self) -> tuple[str, Turn]:
        """Returns the role of an answer, and the assistant's turn before it that the template keeps."""
        words = Turn(2, "assistant", ANSWERED)
        thought = replace(words, reasoning=THOUGHT)
        thinks = self._dialect.field or (self._dialect.inline and self._dialect.think_tags)
        kept = {role: [turn for turn in (words, thought) if self._keeps(turn, role)] for role in ROLES}
        role = next((role for role in ROLES if kept[role]), None)
        if role is None:
            raise InputError(
                "the chat template writes an assistant's turn differently, or refuses, when another turn follows it, "
                "so that texts of several turns cannot be continued; set data.chat_template to another template"
            )
        if thinks and thought not in kept[role]:
            log.warning("the chat template drops the reasoning of earlier turns; in texts of several turns it stays")
        return role, kept[role][0]

    def _keeps(self, turn: Turn, role: str) -> bool:
        """Returns True if the template writes what the model has read and written, and an answer of that role."""
        try:
            asked = self._dialect.messages([Turn(1, "user", ASKED)])
            opened = render(self._tokenizer, asked, self._template, add_generation_prompt=True)
            whole = self._render(PROBE, role, turn)
        except Unrendered:
            return False
        read, found, after = whole.partition(ANSWERED)
        if not (found and PROBE in after and read.startswith(opened)):
            return False
        between = read[len(opened) :].replace("<think>", "").replace("</think>", "")
        return between.strip() == turn.reasoning


def dialogue_of(recipe: Recipe, tokenizer: Any, template: str | None) -> PlainDialogue | ChatDialogue | None:
    """Returns the form of the answers of the recipe's environment; None without one. ``template``: the run's own, None
    for the tokenizer's. Raises InputError for a template that cannot be used."""
    section, literal = recipe.rollout_section, recipe.data.special_tokens == "text"
    if section is None or section.environment is None:
        return None
    if not recipe.data.has_chats:
        return PlainDialogue(tokenizer, literal=literal)
    return ChatDialogue(tokenizer, template or template_of(tokenizer), literal=literal)
