"""A prompt and what is to be said after it: tokens(prompt) + tokens(completion) + eos, targets on completion and eos.

The prompt's tokens include what the tokenizer itself puts around a text (BOS); the completion's include nothing
special.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from trainer.data.sample import RowError, Sample
from trainer.errors import InputError

Pair = tuple[str, str]


class Joiner:
    """InputError when the tokenizer has no eos token; ``format`` is named in it."""

    def __init__(self, tokenizer: Any, format: str) -> None:
        self.tokenizer, self.eos = tokenizer, eos_of(tokenizer, format)

    def encode(self, texts: Sequence[Pair | RowError]) -> list[Sample | RowError]:
        """The pairs of prompt and completion, tokenised together; faults keep their places."""
        pairs = [t for t in texts if not isinstance(t, RowError)]
        if not pairs:
            return [t for t in texts if isinstance(t, RowError)]
        prompts = self.tokenizer([p for p, _ in pairs], return_attention_mask=False)["input_ids"]
        completions = self.tokenizer([c for _, c in pairs], add_special_tokens=False, return_attention_mask=False)[
            "input_ids"
        ]
        encoded = iter([self._join(p, c) for p, c in zip(prompts, completions, strict=True)])
        return [t if isinstance(t, RowError) else next(encoded) for t in texts]

    def _join(self, prompt: list[int], completion: list[int]) -> Sample:
        tokens = np.array([*prompt, *completion, self.eos], dtype=np.int32)
        target = np.zeros(len(tokens), dtype=np.bool_)
        target[len(prompt) :] = True
        return Sample(tokens, target)


def eos_of(tokenizer: Any, format: str) -> int:
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"the tokenizer has no eos token, which the format {format} puts after each text; set eos_token in its "
            "tokenizer_config.json"
        )
    return int(tokenizer.eos_token_id)


def both(prompt: str | RowError, completion: str | RowError) -> Pair | RowError:
    if isinstance(prompt, RowError):
        return prompt
    return completion if isinstance(completion, RowError) else (prompt, completion)
