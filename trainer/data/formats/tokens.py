"""Tokenises texts whole, and finds the token at a character.

A prompt and its answer are tokenised as one text, as they are at inference time: tokenised apart, an answer may begin
with a space that nobody wrote (SentencePiece puts one before each text).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from trainer.chat_templates.turn import Call, Turn
from trainer.data.sample import Sample
from trainer.errors import InputError

Interval = tuple[int, int]
"""A range of characters."""


class Tokenised:
    """The tokens of a text."""

    def __init__(self, tokenizer: Any, text: str, out: Any, row: int, special: bool) -> None:
        self.ids: list[int] = list(out["input_ids"][row])
        self.text = text
        self._tokenizer, self._out, self._row, self._special = tokenizer, out, row, special

    def at(self, character: int) -> int:
        """Returns the index of the token that holds this character, or of the first one behind it."""
        if not self._tokenizer.is_fast:
            how = {"add_special_tokens": self._special, "return_attention_mask": False, "verbose": False}
            before = self._tokenizer(self.text[:character], **how)["input_ids"]
            same = (i for i, (a, b) in enumerate(zip(self.ids, before, strict=False)) if a != b)
            return next(same, min(len(before), len(self.ids)))
        for at in range(character, len(self.text)):
            token = self._out.char_to_token(self._row, at)
            if token is not None:
                return int(token)
        return len(self.ids)

    def span(self, interval: Interval) -> slice:
        """Returns the tokens that have a character of the interval."""
        low, high = interval
        start, stop = self.at(low), self.at(high) if high < len(self.text) else len(self.ids)
        # A token may hold characters of the interval and of the text behind it.
        joined = low < high < len(self.text) and self.at(high - 1) == stop and self._tokenizer.is_fast
        return slice(start, stop + joined)


def tokenise(tokenizer: Any, texts: Sequence[str], *, special: bool, literal: bool = False) -> list[Tokenised]:
    """Tokenises the texts as one batch. ``special``: with the special tokens that the tokenizer puts around a text.
    ``literal``: what looks like a special token in a text is tokenised as any other text."""
    if not texts:
        return []
    how = {"add_special_tokens": special, "split_special_tokens": literal}
    out = tokenizer(list(texts), return_attention_mask=False, verbose=False, **how)
    return [Tokenised(tokenizer, text, out, row, special) for row, text in enumerate(texts)]


class Marks:
    """Marks special tokens in texts before a chat template writes its own, so that the marked ones stay text."""

    START, END = "\ue000", "\ue001"
    """Characters for private use, which are taken out of the texts."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        names = sorted((str(token) for token in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, filter(str.strip, names))) or r"(?!)")

    def mark(self, text: str) -> str:
        text = text.replace(self.START, "").replace(self.END, "")
        return self._special.sub(rf"{self.START}\g<0>{self.END}", text)

    def mark_turn(self, turn: Turn) -> Turn:
        calls = tuple(Call(self.mark(c.name), self._marked(c.arguments), c.id) for c in turn.calls)
        return replace(turn, content=self.mark(turn.content), reasoning=self.mark(turn.reasoning), calls=calls)

    def _marked(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: self._marked(one) for name, one in value.items()}
        if isinstance(value, list):
            return [self._marked(one) for one in value]
        return self.mark(value) if isinstance(value, str) else value

    def tokenise(self, text: str) -> MarkedTokens:
        """Tokenises the marked parts as any text, and what stands between them with special tokens."""
        pieces: list[tuple[int, Tokenised]] = []
        at = 0
        for number, piece in enumerate(re.split(f"[{self.START}{self.END}]", text)):
            pieces += [(at, one) for one in tokenise(self.tokenizer, [piece], special=False, literal=number % 2 == 1)]
            at += len(piece) + 1
        return MarkedTokens(pieces)


class MarkedTokens:
    """The tokens of a text with marks, piece by piece."""

    def __init__(self, pieces: list[tuple[int, Tokenised]]) -> None:
        self._pieces = pieces
        self.ids = [token for _, piece in pieces for token in piece.ids]

    def span(self, interval: Interval) -> slice:
        low, high = interval
        start, stop, before = None, 0, 0
        for at, piece in self._pieces:
            inner = max(low - at, 0), min(high - at, len(piece.text))
            if inner[0] < inner[1]:
                found = piece.span(inner)
                start, stop = before + found.start if start is None else start, before + found.stop
            before += len(piece.ids)
        return slice(start or 0, stop)


class Ends(NamedTuple):
    """The tokens at the ends of a text: ``bos``, if the tokenizer has one, and ``eos``."""

    bos: int | None
    eos: int

    @classmethod
    def of(cls, tokenizer: Any, format: str) -> Ends:
        """Raises InputError, which names ``format``, if there is no eos token."""
        if tokenizer.eos_token_id is None:
            raise InputError(
                f"the tokenizer has no eos token, which the format {format} puts after each text; set eos_token in its "
                "tokenizer_config.json"
            )
        return cls(tokenizer.bos_token_id, int(tokenizer.eos_token_id))

    def closed(self, ids: list[int], start: int) -> Sample:
        """Returns the text's sample with targets from token ``start`` on, with one eos at its end, and with one bos
        where the text and the tokenizer have both written one."""
        doubled = len(ids) > 1 and ids[0] == ids[1] == self.bos
        ids, start = (ids[1:], max(start - 1, 0)) if doubled else (ids, start)
        while len(ids) > 1 and ids[-1] == ids[-2] == self.eos:
            ids = ids[:-1]
        tokens = np.array(ids if ids and ids[-1] == self.eos else [*ids, self.eos], dtype=np.int32)
        return Sample(tokens, np.arange(len(tokens)) >= min(start, len(tokens) - 1))
