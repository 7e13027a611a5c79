"""Greedy answers to many prompts, in batches padded on the left.

A model that reads trained vectors before its text answers in another way: by the forward of training, which knows
where each text begins, without a cache of keys and values. peft counts pads between the vectors and the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from trainer.evaluate.loading import reads_a_prompt

Ended = Callable[[str], bool]
"""Whether a text that has been generated so far is all that is wanted."""

MAX_PROMPT = 1 << 20


class Greedy:
    """Answers with the most likely token at each step, until the end of text, ``max_new_tokens``, or ``ended``."""

    def __init__(self, model: Any, tokenizer: Any, device: torch.device, batch: int) -> None:
        self.model, self.tokenizer, self.device, self.batch = model, tokenizer, device, batch
        self.ends = sorted(_ends(model, tokenizer))
        text = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
        self.positions = int(getattr(text, "max_position_embeddings", None) or MAX_PROMPT)

    @torch.no_grad()
    def answers(self, prompts: Sequence[str], max_new_tokens: int, ended: Ended) -> list[str]:
        """In the order of the prompts. One that would leave the model no room keeps its end."""
        room = max(1, self.positions - max_new_tokens)
        rows = [ids[-room:] for ids in self.tokenizer(list(prompts))["input_ids"]] if prompts else []
        said: dict[int, str] = {}
        for numbers in _alike(rows, self.batch):
            batch = [rows[n] for n in numbers]
            write = self._without_cache if reads_a_prompt(self.model) else self._with_cache
            said.update(zip(numbers, write(batch, max_new_tokens, ended), strict=True))
        return [said[n] for n in range(len(rows))]

    def _text(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def _with_cache(self, rows: list[list[int]], max_new_tokens: int, ended: Ended) -> list[str]:
        from transformers import GenerationConfig, StoppingCriteriaList

        width = max(map(len, rows))
        pad = self.ends[0] if self.ends else 0
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=self.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=self.device)

        def stop(so_far: torch.Tensor, scores: Any, **rest: Any) -> torch.Tensor:
            done = [ended(self._text(row)) for row in so_far[:, width:].tolist()]
            return torch.tensor(done, device=so_far.device)

        config = GenerationConfig(
            do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=self.ends or None, pad_token_id=pad
        )
        stopping = StoppingCriteriaList([stop])
        out = self.model.generate(
            input_ids=ids, attention_mask=mask, generation_config=config, stopping_criteria=stopping
        )
        return [self._text(self._until_end(row)) for row in out[:, width:].tolist()]

    def _until_end(self, ids: list[int]) -> list[int]:
        return ids[: next((i for i, token in enumerate(ids) if token in self.ends), len(ids))]

    def _without_cache(self, rows: list[list[int]], max_new_tokens: int, ended: Ended) -> list[str]:
        written: list[list[int]] = [[] for _ in rows]
        going = list(range(len(rows)))
        for _ in range(max_new_tokens):
            chosen = self._next([rows[n] + written[n] for n in going])
            for n, token in zip(going, chosen, strict=True):
                written[n].append(token)
            going = [n for n in going if written[n][-1] not in self.ends and not ended(self._text(written[n]))]
            if not going:
                break
        return [self._text(self._until_end(ids)) for ids in written]

    def _next(self, rows: list[list[int]]) -> list[int]:
        """Pads stand behind the texts, each at position 0, where training has them too."""
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=self.device)
        places = [[*range(len(row))] + [0] * (width - len(row)) for row in rows]
        positions = torch.tensor(places, device=self.device)
        logits = self.model(input_ids=ids, position_ids=positions, use_cache=False).logits
        last = torch.tensor([len(row) - 1 for row in rows], device=self.device)
        chosen: list[int] = logits[torch.arange(len(rows), device=self.device), last].argmax(-1).tolist()
        return chosen


def _alike(rows: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    """The numbers of the rows in batches of like lengths, so that little is padded; the longest first."""
    order = sorted(range(len(rows)), key=lambda n: (-len(rows[n]), n))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _ends(model: Any, tokenizer: Any) -> set[int]:
    """The tokenizer's end of text, which training puts after each answer, and what the model's authors end with."""
    theirs = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    several = theirs if isinstance(theirs, list) else [theirs]
    return {int(n) for n in (tokenizer.eos_token_id, *several) if n is not None}
