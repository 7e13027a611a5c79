"""The data formats: the columns that each one reads and the samples that it gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer.recipe.tasks import TASKS
from trainer.registry import Choice, Registry


@dataclass(frozen=True)
class FormatRow(Choice):
    """A format's row.

    ``columns``: those that it reads; a source's `columns` maps these names to those of the file. ``gives``: the kind of
    samples: prompted (a prompt and its answer), text, preference (pairs), rated (an answer that is good or bad), label.
    ``optional``: columns that rows may lack. ``chats``: its rows may be conversations. ``templated``: a `template` may
    render the prompt or the text. ``unpacked``: why its samples cannot share a pack, if they cannot. ``as_chat``:
    columns that it reads besides when the chat template frames it (`as: chat`); () if that cannot be. ``frame``: how a
    prompt is framed when the model is used (`trainer.artifacts.chat.FRAMES`); None: as plain text. ``examples``: rows
    that it takes, for its contract test."""

    columns: tuple[str, ...]
    gives: str
    optional: tuple[str, ...] = ()
    chats: bool = False
    templated: bool = False
    unpacked: str | None = None
    as_chat: tuple[str, ...] = ()
    frame: str | None = None
    examples: tuple[Mapping[str, Any], ...] = ()

    @property
    def asks(self) -> bool:
        """True if a sample has a prompt, and an answer to it."""
        return self.gives in ("prompted", "preference", "rated")

    def reads(self, style: str) -> tuple[str, ...]:
        """Returns the columns that it reads in this style, ``text`` or ``chat``."""
        return self.columns + (self.as_chat if style == "chat" else ())


FORMATS = Registry(
    "data format",
    {
        "completion": FormatRow(
            "trainer.data.formats.completion:Completion",
            ("prompt", "completion"),
            "prompted",
            templated=True,
            examples=({"prompt": "Who? ", "completion": "Mira."},),
        ),
        "messages": FormatRow(
            "trainer.data.formats.messages:MessagesFormat",
            ("messages", "tools", "system"),
            "prompted",
            optional=("tools", "system"),
            chats=True,
            frame="chat",
            examples=(
                {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Mira, é 日本."}]},
            ),
        ),
        "instruction": FormatRow(
            "trainer.data.formats.instruction:Instruction",
            ("instruction", "input", "output"),
            "prompted",
            optional=("input",),
            as_chat=("system", "history"),
            templated=True,
            frame="instruction",
            examples=({"instruction": "Say who.", "output": "Mira."},),
        ),
        "qa": FormatRow(
            "trainer.data.formats.qa:QuestionAnswer",
            ("question", "answer", "aliases"),
            "prompted",
            optional=("aliases",),
            frame="qa",
            examples=({"question": "Who?", "answer": "Mira."},),
        ),
        "text": FormatRow(
            "trainer.data.formats.text:TextFormat", ("text",), "text", examples=({"text": "Mira is a baker."},)
        ),
        "preference": FormatRow(
            "trainer.data.formats.preference:Preference",
            ("prompt", "chosen", "rejected", "margin"),
            "preference",
            optional=("margin",),
            chats=True,
            unpacked="whose samples are pairs",
            examples=({"prompt": "Who? ", "chosen": "Mira.", "rejected": "No."},),
        ),
        "unpaired_preference": FormatRow(
            "trainer.data.formats.unpaired_preference:UnpairedPreference",
            ("prompt", "completion", "label"),
            "rated",
            chats=True,
            unpacked="whose answers are compared with those to other prompts",
            examples=({"prompt": "Who? ", "completion": "Mira.", "label": True},),
        ),
        "classification": FormatRow(
            "trainer.data.formats.classification:ClassificationFormat",
            ("text", "text_pair", "label"),
            "label",
            optional=("text_pair",),
            templated=True,
            unpacked="whose texts are read one by one",
            examples=({"text": "Mira is a baker.", "label": "yes"},),
        ),
    },
    # Not alpaca: trainers differ in whether its rows get Alpaca's prompt or the chat template (see `synonyms`).
    also={"sharegpt": "messages", "openai": "messages", "chatml": "messages"},
    group="muster.formats",
    held=FormatRow("", (), "prompted"),
)


CHAT_TEMPLATES = ("chatml", "llama3", "qwen3", "gemma", "mistral", "phi", "deepseek", "glm", "alpaca", "vicuna")
"""The chat templates that a recipe may name: the files of ``trainer/chat_templates``."""


def formats_of(task: str) -> tuple[str, ...]:
    """Returns the formats that the task learns from."""
    return tuple(name for name, row in FORMATS.items() if row.gives in TASKS[task].learns_from)
