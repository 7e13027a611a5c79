"""Generation of texts for prompts, in batches padded on the left, by greedy decoding or sampling.

A model with trained vectors before its text generates in another way: by the forward of training, which has the start
of each text, and without a KV cache. peft itself would count the pads between the vectors and the text as positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trainer.artifacts.load import reads_a_prompt
from trainer.tasks.sampling import end_tokens, max_positions, padded_left

Ended = Callable[[str], bool]
"""Returns True if the text generated so far is complete."""

MAX_PROMPT = 1 << 20


@dataclass(frozen=True)
class Sampling:
    """``temperature`` 0 takes the most likely token; otherwise logits are divided by it, and a token is drawn from the
    smallest set whose probabilities add up to ``top_p`` (Holtzman et al. 2019, arXiv:1904.09751)."""

    temperature: float = 0.0
    top_p: float = 1.0

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def settings(self) -> dict[str, Any]:
        """Returns the arguments of transformers' GenerationConfig."""
        if self.greedy:
            return {"do_sample": False}
        # top_k: the default keeps only the 50 most likely tokens.
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}

    def next(self, logits_BV: torch.Tensor) -> torch.Tensor:
        if self.greedy:
            return logits_BV.argmax(-1)
        from transformers import TemperatureLogitsWarper, TopPLogitsWarper

        unused: Any = None
        scores = TemperatureLogitsWarper(self.temperature)(unused, logits_BV.float())
        scores = TopPLogitsWarper(self.top_p)(unused, scores)
        return torch.multinomial(scores.softmax(-1), 1)[:, 0]


GREEDY = Sampling()


class Generator:
    """Generates texts until the end of text, ``max_new_tokens``, or ``ended``."""

    def __init__(
        self, model: Any, tokenizer: Any, device: torch.device, batch: int, sampling: Sampling = GREEDY
    ) -> None:
        from transformers import GenerationConfig

        self.model, self.tokenizer, self.device, self.batch = model, tokenizer, device, batch
        self.sampling = sampling
        self.ends = sorted(end_tokens(model, tokenizer))
        model.generation_config = GenerationConfig()  # drops the sampling settings of the model's authors
        self.positions = max_positions(model) or MAX_PROMPT

    @torch.no_grad()
    def answers(
        self,
        prompts: Sequence[str | Sequence[int]],
        max_new_tokens: int,
        ended: Ended | None = None,
        done: Callable[[int], None] = lambda answers: None,
    ) -> list[str]:
        """Returns the answers in the order of the prompts, which are text or token ids. If a prompt and
        ``max_new_tokens`` exceed the model's positions, fewer tokens are generated, and a prompt longer than half of
        the positions may lose its beginning. ``done``: called with the number of further prompts answered."""
        rows = [self._ids(prompt, max_new_tokens) for prompt in prompts]
        texts: dict[int, str] = {}
        for numbers in self._batches(rows, max_new_tokens):
            written = self._write([rows[n] for n in numbers], max_new_tokens, ended, None)
            texts.update(zip(numbers, written, strict=True))
            done(len(numbers))
        return [texts[n] for n in range(len(rows))]

    @torch.no_grad()
    def stream(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int,
        say: Callable[[str], None],
        ended: Ended | None = None,
    ) -> str:
        """Returns one answer. Calls ``say`` with each piece of its text as soon as the piece is complete."""
        pieces = TokenStreamer(self.tokenizer, self.ends, say)
        (text,) = self._write([self._ids(prompt, max_new_tokens)], max_new_tokens, ended, pieces)
        pieces.end()
        return text

    def _ids(self, prompt: str | Sequence[int], max_new_tokens: int) -> list[int]:
        room = self.positions - min(max_new_tokens, self.positions // 2)
        ids: list[int] = self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else list(prompt)
        return ids[-room:]

    def _batches(self, rows: Sequence[Sequence[int]], max_new_tokens: int) -> Iterator[list[int]]:
        """Yields the indices of rows in batches of similar length, to reduce padding; the longest first."""
        order = sorted(range(len(rows)), key=lambda n: (-len(rows[n]), n))
        # A row without room for `max_new_tokens` is a batch of its own: otherwise it would shorten the other answers.
        tight = sum(len(row) + max_new_tokens > self.positions for row in rows)
        yield from ([n] for n in order[:tight])
        for start in range(tight, len(order), self.batch):
            yield order[start : start + self.batch]

    def _write(
        self, rows: list[list[int]], max_new_tokens: int, ended: Ended | None, pieces: TokenStreamer | None
    ) -> list[str]:
        write = self._without_cache if reads_a_prompt(self.model) else self._with_cache
        room = self.positions - max(map(len, rows))
        return write(rows, min(max_new_tokens, room), ended, pieces)

    def _text(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def _with_cache(
        self, rows: list[list[int]], max_new_tokens: int, ended: Ended | None, pieces: TokenStreamer | None
    ) -> list[str]:
        from transformers import GenerationConfig, StoppingCriteriaList

        pad = self.ends[0] if self.ends else 0
        ids, mask = padded_left(rows, pad, self.device)
        width = ids.shape[1]

        def stop(so_far: torch.Tensor, scores: Any, **rest: Any) -> torch.Tensor:
            assert ended is not None
            done = [ended(self._text(row)) for row in so_far[:, width:].tolist()]
            return torch.tensor(done, device=so_far.device)

        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            eos_token_id=self.ends or None,
            pad_token_id=pad,
            **self.sampling.settings(),
        )
        out = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([stop] if ended else []),
            streamer=pieces,
        )
        return [self._text(self._until_end(row)) for row in out[:, width:].tolist()]

    def _until_end(self, ids: list[int]) -> list[int]:
        return ids[: next((i for i, token in enumerate(ids) if token in self.ends), len(ids))]

    def _without_cache(
        self, rows: list[list[int]], max_new_tokens: int, ended: Ended | None, pieces: TokenStreamer | None
    ) -> list[str]:
        written: list[list[int]] = [[] for _ in rows]
        going = list(range(len(rows)))
        for _ in range(max_new_tokens):
            chosen = self._next([rows[n] + written[n] for n in going])
            for n, token in zip(going, chosen, strict=True):
                written[n].append(token)
                if pieces:
                    pieces.add(token)
            going = [n for n in going if written[n][-1] not in self.ends]
            if ended is not None:
                going = [n for n in going if not ended(self._text(written[n]))]
            if not going:
                break
        return [self._text(self._until_end(ids)) for ids in written]

    def _next(self, rows: list[list[int]]) -> list[int]:
        """Returns the next token of each row, from a forward without a cache."""
        # Pads follow the texts, each at position 0, as in training.
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=self.device)
        places = [[*range(len(row))] + [0] * (width - len(row)) for row in rows]
        positions = torch.tensor(places, device=self.device)
        logits = self.model(input_ids=ids, position_ids=positions, use_cache=False).logits
        last = torch.tensor([len(row) - 1 for row in rows], device=self.device)
        chosen: list[int] = self.sampling.next(logits[torch.arange(len(rows), device=self.device), last]).tolist()
        return chosen


class TokenStreamer:
    """Decodes tokens to text as they arrive, with the interface of transformers' streamers. Holds back a character
    until all its bytes have arrived."""

    def __init__(self, tokenizer: Any, ends: Sequence[int], say: Callable[[str], None]) -> None:
        self.tokenizer, self.ends, self.say = tokenizer, set(ends), say
        self._ids: list[int] = []
        self._printed = 0
        self._prompt = True

    def put(self, tokens: torch.Tensor) -> None:
        if self._prompt:  # transformers passes the prompt first
            self._prompt = False
            return
        for token in tokens.reshape(-1).tolist():
            self.add(token)

    def add(self, token: int) -> None:
        if token not in self.ends:
            self._ids.append(token)
            self._emit(final=False)

    def end(self) -> None:
        self._emit(final=True)

    def _emit(self, *, final: bool) -> None:
        text: str = self.tokenizer.decode(self._ids, skip_special_tokens=True)
        if len(text) > self._printed and (final or not text.endswith("\N{REPLACEMENT CHARACTER}")):
            self.say(text[self._printed :])
            self._printed = len(text)
