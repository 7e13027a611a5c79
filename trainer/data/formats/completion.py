"""completion: tokens(prompt) + tokens(completion) + eos, targets on completion and eos.

The prompt's tokens include what the tokenizer itself puts around a text (BOS); the completion's include nothing
special. With a template, the prompt is the template filled with the row's columns.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

import numpy as np

from trainer.data.formats import column_of, text_of
from trainer.data.rows import Encoded, Fault, Row
from trainer.data.spec import FrozenSource
from trainer.errors import InputError


class Completion:
    def __init__(self, source: FrozenSource, tokenizer: Any, chat_template: str | None) -> None:
        del chat_template  # prompt and completion are taken as they stand
        if tokenizer.eos_token_id is None:
            raise InputError(
                "the tokenizer has no eos token, which the format completion puts after each completion; set eos_token "
                "in its tokenizer_config.json"
            )
        self.tokenizer = tokenizer
        self.eos = int(tokenizer.eos_token_id)
        self.columns = source.columns
        self.template = source.template
        self.fields = fields_of(source.template or "")

    def encode(self, rows: Sequence[Row]) -> list[Encoded | Fault]:
        texts = [self._texts(row) for row in rows]
        pairs = [t for t in texts if not isinstance(t, Fault)]
        if not pairs:
            return [t for t in texts if isinstance(t, Fault)]
        prompts = self.tokenizer([p for p, _ in pairs], return_attention_mask=False)["input_ids"]
        completions = self.tokenizer([c for _, c in pairs], add_special_tokens=False, return_attention_mask=False)[
            "input_ids"
        ]
        encoded = iter([self._join(p, c) for p, c in zip(prompts, completions, strict=True)])
        return [t if isinstance(t, Fault) else next(encoded) for t in texts]

    def _texts(self, row: Row) -> tuple[str, str] | Fault:
        prompt = self._text(row, "prompt") if self.template is None else self._filled(row, self.template)
        completion = self._text(row, "completion")
        if isinstance(prompt, Fault):
            return prompt
        return completion if isinstance(completion, Fault) else (prompt, completion)

    def _text(self, row: Row, role: str) -> str | Fault:
        return text_of(row, self.columns.get(role, role), role)

    def _filled(self, row: Row, template: str) -> str | Fault:
        values = {name: column_of(row, self.columns.get(name, name), name) for name in self.fields}
        faults = [v for v in values.values() if isinstance(v, Fault)]
        return faults[0] if faults else template.format_map(values)

    def _join(self, prompt: list[int], completion: list[int]) -> Encoded:
        tokens = np.array([*prompt, *completion, self.eos], dtype=np.int32)
        target = np.zeros(len(tokens), dtype=np.bool_)
        target[len(prompt) :] = True
        return Encoded(tokens, target)


def fields_of(template: str) -> tuple[str, ...]:
    """The names that a str.format template fills in; the recipe has checked that each is a plain name."""
    return tuple(name for _, name, _, _ in string.Formatter().parse(template) if name is not None)
