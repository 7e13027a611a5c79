"""A prompt and its completion: tokens(prompt and completion) + eos, with targets on the completion and eos.

The special tokens that the tokenizer puts around a text are around both together. What the text has already is not
doubled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from trainer.data.formats.tokens import Ends, tokenise
from trainer.data.sample import RowError, Sample

Pair = tuple[str, str]

JOINED = (
    "the tokenizer joins the end of a prompt and the start of its completion into one token, which is a target as a "
    "whole; where a prompt ends with a space, write that space at the start of the completion"
)


class Joiner:
    """Encodes pairs of prompt and completion. Raises InputError, which names ``format``, if there is no eos token.
    ``literal``: see `tokenise`."""

    def __init__(self, tokenizer: Any, format: str, literal: bool = False) -> None:
        self.tokenizer, self.ends, self.literal = tokenizer, Ends.of(tokenizer, format), literal

    def encode(self, texts: Sequence[Pair | RowError]) -> list[Sample | RowError]:
        """Tokenises the pairs as one batch. Returns a RowError unchanged, at its place."""
        pairs = [t for t in texts if not isinstance(t, RowError)]
        texts_of_pairs = [prompt + completion for prompt, completion in pairs]
        encoded = iter(tokenise(self.tokenizer, texts_of_pairs, special=True, literal=self.literal))
        samples: list[Sample | RowError] = []
        for given in texts:
            if isinstance(given, RowError):
                samples.append(given)
                continue
            prompt, completion = given
            tokens = next(encoded)
            ended = bool(tokens.ids) and tokens.ids[-1] == self.ends.eos
            start = tokens.at(len(prompt)) if completion else len(tokens.ids) - ended
            sample = self.ends.closed(tokens.ids, start)
            joined = bool(prompt and completion) and tokens.at(len(prompt) - 1) == start
            samples.append(replace(sample, warnings=(JOINED,)) if joined else sample)
        return samples


def both(prompt: str | RowError, completion: str | RowError) -> Pair | RowError:
    if isinstance(prompt, RowError):
        return prompt
    return completion if isinstance(completion, RowError) else (prompt, completion)
