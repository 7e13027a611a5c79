"""Frames: the prompt formats of a question, the same as in training.

chat         the tokenizer's chat template, with all earlier turns
qa           ``Question: …`` and ``Answer:``, each question separately
instruction  Alpaca's prompt, each instruction separately
template     the recipe's own template, if it has a single blank
plain        the text unchanged, each text separately
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

from trainer.chat_templates.turn_end import TurnEnd, turn_end
from trainer.data.formats.chat import Chat
from trainer.data.formats.chat import Conversation as ChatTurns
from trainer.data.formats.columns import fields_of
from trainer.data.formats.instruction import prompt_of
from trainer.data.formats.qa import framed
from trainer.data.formats.turns import turns_of
from trainer.data.sample import RowError
from trainer.errors import UsageError
from trainer.recipe.formats import FORMATS

CHAT, QA, INSTRUCTION, TEMPLATE, PLAIN = FRAMES = ("chat", "qa", "instruction", "template", "plain")

HOW = {
    CHAT: "go through the chat template",
    QA: "are put as Question: and Answer:",
    INSTRUCTION: "are put as instructions",
    TEMPLATE: "fill the template of the training data",
    PLAIN: "are used as they are",
}
"""What happens to prompts, for each frame."""

Turns = list[dict[str, str]]
Prompt = str | list[int]


def frame_for(tokenizer: Any, given: str | None, format: str | None, template: str | None = None) -> str:
    """Returns the frame ``given`` by the user, or else the one for the training data's ``format`` and ``template``.
    Without any of them, it is a chat if the tokenizer has a chat template. Raises UsageError for an unusable frame."""
    fillable = template is not None and len(set(fields_of(template))) == 1
    if given is not None and given not in FRAMES:
        raise UsageError(f"--frame {given!r} is not one of: {', '.join(FRAMES)}")
    if given == CHAT and not tokenizer.chat_template:
        raise UsageError("the tokenizer has no chat template; use --frame qa or --frame plain")
    if given == TEMPLATE and not fillable:
        raise UsageError("the training data had no template with a single blank; use another --frame")
    if given:
        return given
    if fillable:
        return TEMPLATE
    row = FORMATS.get(format or "")
    if row and row.frame:
        return row.frame
    return CHAT if tokenizer.chat_template and format in (None, "preference") else PLAIN


class Conversation:
    """The turns of a conversation. ``system``: a system message before the turns, for the frame ``chat`` only.
    ``template``: for the frame ``template``."""

    def __init__(self, tokenizer: Any, frame: str, system: str | None = None, template: str | None = None) -> None:
        if system and frame != CHAT:
            raise UsageError(f"--system has no effect with the frame {frame}; leave it out")
        self.tokenizer, self.frame, self.system, self.template = tokenizer, frame, system, template
        self.end = turn_end(tokenizer) if frame == CHAT else TurnEnd()
        self.turns: Turns = []
        self.clear()

    @cached_property
    def chat(self) -> Chat:
        return Chat(self.tokenizer, None)

    def clear(self) -> None:
        self.turns = [{"role": "system", "content": self.system}] if self.system else []

    def ask(self, text: str) -> Prompt:
        """Returns the prompt for the next answer: text, or tokens for a chat, whose template adds special tokens."""
        if self.frame == CHAT:
            self.turns.append({"role": "user", "content": text})
            return rendered(self.chat, self.turns)
        if self.frame == TEMPLATE:
            assert self.template is not None
            return self.template.format_map(dict.fromkeys(fields_of(self.template), text))
        return framed(text) if self.frame == QA else prompt_of((text, "")) if self.frame == INSTRUCTION else text

    def answered(self, text: str) -> None:
        if self.frame == CHAT:
            self.turns.append({"role": "assistant", "content": text})

    def take_back(self) -> None:
        """Removes the last question, which was not answered."""
        if self.frame == CHAT:
            self.turns.pop()

    def shown(self, text: str) -> str:
        """Returns the answer in a generated text: its first line in the frame ``qa``; in a chat, what stands before
        that which the template writes after a turn."""
        return first_line(text) if self.frame == QA else self.end.cut(text)

    def certain(self, text: str) -> str:
        """Returns what of an unfinished text is part of the answer, however it goes on."""
        return self.end.certain(text)

    def ended(self, text: str) -> bool:
        return one_line(text) if self.frame == QA else self.end.cut(text) != text


def first_line(text: str) -> str:
    """Returns the first line that is not blank."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def one_line(text: str) -> bool:
    """Returns True if the text contains a complete line that is not blank."""
    return "\n" in text.lstrip()


def rendered(chat: Chat, turns: Turns) -> list[int]:
    """Returns the token ids of a conversation, up to the start of the assistant's answer. Raises UsageError when it is
    none, or when the template refuses it."""
    if not chat.template:
        raise UsageError("messages need a chat template, and the tokenizer has none; give a prompt instead")
    read = turns_of(turns, empty=True)
    prompt = read if isinstance(read, RowError) else chat.prompt(ChatTurns(read))
    if isinstance(prompt, RowError):
        raise UsageError(f"the conversation cannot be used: {prompt.reason}")
    return prompt
