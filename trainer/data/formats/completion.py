"""completion: a prompt and its completion. A template, filled with the row's columns, makes the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trainer.data.formats.columns import Columns
from trainer.data.formats.joined import Joiner, Pair, both
from trainer.data.rows import Encoded, Fault, Row
from trainer.data.spec import FrozenSource, Preparation


class Completion:
    def __init__(self, source: FrozenSource, tokenizer: Any, spec: Preparation) -> None:
        del spec  # prompt and completion are taken as they stand
        self.joiner, self.columns = Joiner(tokenizer, "completion"), Columns(source)

    def encode(self, rows: Sequence[Row]) -> list[Encoded | Fault]:
        return self.joiner.encode([texts_of(row, self.columns) for row in rows])


def texts_of(row: Row, columns: Columns) -> Pair | Fault:
    template = columns.template
    prompt = columns.text(row, "prompt") if template is None else columns.filled(row, template)
    return both(prompt, columns.text(row, "completion"))
