"""completion: a prompt and its completion. If there is a template, the prompt is the template with the row's columns.

Task ppo generates completions itself; there a row need not have one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trainer.data.formats.columns import Columns
from trainer.data.formats.joined import Joiner, Pair, both
from trainer.data.sample import Row, RowError, Sample
from trainer.data.spec import FrozenSource, PreparationSpec
from trainer.recipe.tasks import TASKS


class Completion:
    def __init__(self, source: FrozenSource, tokenizer: Any, spec: PreparationSpec) -> None:
        self.joiner, self.columns = Joiner(tokenizer, "completion", spec.special_tokens == "text"), Columns(source)
        self.of_prompts = TASKS[spec.task].generates

    def encode(self, rows: Sequence[Row]) -> list[Sample | RowError]:
        return self.joiner.encode([texts_of(row, self.columns, of_prompts=self.of_prompts) for row in rows])


def texts_of(row: Row, columns: Columns, *, of_prompts: bool = False) -> Pair | RowError:
    template = columns.template
    prompt = columns.text(row, "prompt") if template is None else columns.filled(row, template)
    return both(prompt, columns.answer(row, "completion", of_prompts))
