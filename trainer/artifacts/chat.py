"""How a question is put to a model: as it was put in training.

chat         by the tokenizer's chat template, with everything that was said before
qa           ``Question: …`` and ``Answer:``, each question by itself
instruction  Alpaca's prompt, each instruction by itself
template     the recipe's own, where it has a single blank
plain        the text as it is, each by itself
"""

from __future__ import annotations

from typing import Any

from trainer.data.formats.columns import encodable, fields_of
from trainer.data.formats.instruction import prompt_of
from trainer.data.formats.qa import framed
from trainer.data.formats.rendering import Unrendered, render
from trainer.data.sample import RowError
from trainer.errors import UsageError

CHAT, QA, INSTRUCTION, TEMPLATE, PLAIN = FRAMES = ("chat", "qa", "instruction", "template", "plain")
FRAME_OF_FORMAT = {"messages": CHAT, "qa": QA, "instruction": INSTRUCTION}
"""Of the training data; other formats are written as text."""

Turns = list[dict[str, str]]
Prompt = str | list[int]


def frame_for(tokenizer: Any, given: str | None, format: str | None, template: str | None = None) -> str:
    """``given`` by the user, or as the training data's ``format`` and ``template`` have it. What nobody has said
    anything of is a chat where the tokenizer has a template. Raises UsageError."""
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
    if format in FRAME_OF_FORMAT:
        return FRAME_OF_FORMAT[format]
    return CHAT if tokenizer.chat_template and format in (None, "preference") else PLAIN


class Conversation:
    """What has been said so far. ``system`` stands before it, where the frame knows such a thing; ``template`` is for
    the frame of that name."""

    def __init__(self, tokenizer: Any, frame: str, system: str | None = None, template: str | None = None) -> None:
        if system and frame != CHAT:
            raise UsageError(f"--system has no effect with the frame {frame}; leave it out")
        self.tokenizer, self.frame, self.system, self.template = tokenizer, frame, system, template
        self.turns: Turns = []
        self.clear()

    def clear(self) -> None:
        self.turns = [{"role": "system", "content": self.system}] if self.system else []

    def ask(self, text: str) -> Prompt:
        """The prompt for the next answer. A chat is given as tokens: its template writes the special ones itself."""
        if self.frame != CHAT:
            return self._put(text)
        self.turns.append({"role": "user", "content": text})
        return rendered(self.tokenizer, self.turns)

    def _put(self, text: str) -> str:
        if self.frame == TEMPLATE:
            assert self.template is not None
            return self.template.format_map(dict.fromkeys(fields_of(self.template), text))
        return framed(text) if self.frame == QA else prompt_of((text, "")) if self.frame == INSTRUCTION else text

    def answered(self, text: str) -> None:
        if self.frame == CHAT:
            self.turns.append({"role": "assistant", "content": text})

    def take_back(self) -> None:
        """The last question, which nobody answered."""
        if self.frame == CHAT:
            self.turns.pop()

    def shown(self, text: str) -> str:
        """Of what was written, what is the answer: in the frame of questions, its first line."""
        return first_line(text) if self.frame == QA else text

    def ended(self, text: str) -> bool:
        return self.frame == QA and one_line(text)


def first_line(text: str) -> str:
    """The first line with something on it."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def one_line(text: str) -> bool:
    """Whether a line with something on it has come to its end."""
    return "\n" in text.lstrip()


def rendered(tokenizer: Any, turns: Turns) -> list[int]:
    """Token ids of a conversation, up to where the assistant speaks. Raises UsageError when the template refuses it."""
    if not tokenizer.chat_template:
        raise UsageError("messages need a chat template, and the tokenizer has none; give a prompt instead")
    try:
        text = render(tokenizer, turns, add_generation_prompt=True)
    except Unrendered as error:
        raise UsageError(f"the chat template refuses the conversation: {error}") from error
    if isinstance(fault := encodable(str(text)), RowError):
        raise UsageError(f"the conversation cannot be used: {fault.reason}")
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
