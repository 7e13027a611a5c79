"""instruction: Alpaca's prompt with an instruction and, if there is one, its input. The output is the completion.

The wording is that of Stanford Alpaca (Taori et al. 2023). A template replaces it. As a chat (``as: chat``), the
instruction and its input are the user's turn and the output is the assistant's, behind the turns of ``history`` (pairs
of a question and its answer) and the ``system`` text; the chat template frames them. Task ppo generates outputs itself;
there a row need not have one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trainer.data.formats.chat import Conversation, chat_of
from trainer.data.formats.columns import Columns, as_text
from trainer.data.formats.joined import Joiner, Pair, both
from trainer.data.formats.messages import encode_conversations
from trainer.data.formats.turns import turns_of
from trainer.data.sample import Row, RowError, Sample
from trainer.data.spec import FrozenSource, PreparationSpec
from trainer.recipe.tasks import TASKS

PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


class Instruction:
    def __init__(self, source: FrozenSource, tokenizer: Any, spec: PreparationSpec) -> None:
        self.joiner, self.columns = Joiner(tokenizer, "instruction", spec.special_tokens == "text"), Columns(source)
        self.chat = chat_of(source, tokenizer, spec) if source.style == "chat" else None
        self.of_prompts, self.last_only = TASKS[spec.task].generates, source.train_on == "last"

    def encode(self, rows: Sequence[Row]) -> Sequence[Sample | list[Sample] | RowError]:
        if self.chat is not None:
            return encode_conversations(self.chat, [self._conversation(row) for row in rows], self.of_prompts)
        outputs = [self.columns.answer(row, "output", self.of_prompts) for row in rows]
        return self.joiner.encode([both(self._prompt(row), output) for row, output in zip(rows, outputs, strict=True)])

    def _prompt(self, row: Row) -> str | RowError:
        if self.columns.template is not None:
            return self.columns.filled(row, self.columns.template)
        texts = self._texts(row)
        return texts if isinstance(texts, RowError) else prompt_of(texts)

    def _texts(self, row: Row) -> Pair | RowError:
        given = self.columns.optional(row, "input")
        return both(self.columns.text(row, "instruction"), "" if given is None else as_text(given, "input"))

    def _conversation(self, row: Row) -> Conversation | RowError:
        if self.columns.template is not None:
            asked = self.columns.filled(row, self.columns.template)
        else:
            texts = self._texts(row)
            asked = texts if isinstance(texts, RowError) else "\n".join(text for text in texts if text.strip())
        output, history = self.columns.answer(row, "output", self.of_prompts), self.columns.optional(row, "history")
        for part in (asked, output, history):
            if isinstance(part, RowError):
                return part
        turns = []
        if not isinstance(history, list | None):
            return RowError(f"the history has to be a list of pairs of a question and its answer, not {history!r:.60}")
        for pair in history or []:
            if not isinstance(pair, list) or len(pair) != 2:
                return RowError(f"the history has to be a list of pairs of a question and its answer, not {pair!r:.60}")
            turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
        turns.append({"role": "user", "content": asked})
        if output:
            turns.append({"role": "assistant", "content": output})
        read = turns_of(turns, self.columns.optional(row, "system"))
        return read if isinstance(read, RowError) else Conversation(read, None, self.last_only)


def prompt_of(texts: Pair) -> str:
    instruction, given = texts
    if not given.strip():
        return PROMPT.format(instruction=instruction)
    return PROMPT_WITH_INPUT.format(instruction=instruction, input=given)
