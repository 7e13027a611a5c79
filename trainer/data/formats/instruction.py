"""instruction: Alpaca's prompt with an instruction and, if there is one, its input. The output is the completion.

The wording is that of Stanford Alpaca (Taori et al. 2023). A template replaces it. Task ppo generates outputs itself;
there a row need not have one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trainer.data.formats.columns import Columns, as_text
from trainer.data.formats.joined import Joiner, Pair, both
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
        self.joiner, self.columns = Joiner(tokenizer, "instruction"), Columns(source)
        self.of_prompts = TASKS[spec.task].generates

    def encode(self, rows: Sequence[Row]) -> list[Sample | RowError]:
        outputs = [self.columns.answer(row, "output", self.of_prompts) for row in rows]
        return self.joiner.encode([both(self._prompt(row), output) for row, output in zip(rows, outputs, strict=True)])

    def _prompt(self, row: Row) -> str | RowError:
        if self.columns.template is not None:
            return self.columns.filled(row, self.columns.template)
        given = self.columns.optional(row, "input")
        texts = both(self.columns.text(row, "instruction"), "" if given is None else as_text(given, "input"))
        return texts if isinstance(texts, RowError) else prompt_of(texts)


def prompt_of(texts: Pair) -> str:
    instruction, given = texts
    if not given.strip():
        return PROMPT.format(instruction=instruction)
    return PROMPT_WITH_INPUT.format(instruction=instruction, input=given)
