"""A prompt and its completion: tokens(prompt) + tokens(completion) + eos, with targets on completion and eos.

The prompt's tokens include the special tokens that the tokenizer adds to a text (BOS). The completion's include none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from trainer.data.sample import RowError, Sample
from trainer.errors import InputError

Pair = tuple[str, str]


class Joiner:
    """Encodes pairs of prompt and completion. Raises InputError, which names ``format``, if there is no eos token."""

    def __init__(self, tokenizer: Any, format: str) -> None:
        self.tokenizer, self.eos = tokenizer, eos_of(tokenizer, format)

    def encode(self, texts: Sequence[Pair | RowError]) -> list[Sample | RowError]:
        """Tokenises the pairs as one batch. Returns a RowError unchanged, at its place."""
        pairs = [t for t in texts if not isinstance(t, RowError)]
        if not pairs:
            return [t for t in texts if isinstance(t, RowError)]
        prompts = self.tokenizer([p for p, _ in pairs], return_attention_mask=False)["input_ids"]
        completions = self.tokenizer([c for _, c in pairs], add_special_tokens=False, return_attention_mask=False)[
            "input_ids"
        ]
        samples = []
        for prompt, completion in zip(prompts, completions, strict=True):
            tokens = np.array([*prompt, *completion, self.eos], dtype=np.int32)
            samples.append(Sample(tokens, np.arange(len(tokens)) >= len(prompt)))
        encoded = iter(samples)
        return [t if isinstance(t, RowError) else next(encoded) for t in texts]


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
