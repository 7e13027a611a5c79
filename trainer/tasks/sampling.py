"""Sampling of completions for a micro-batch of prompts, padded on the left, with a KV cache.

Each row has its own stream of random numbers, one per token, which invert the cumulative distribution. So a text
depends on its micro-batch and its stream, never on the rank that samples it.

Shapes: B prompts, P tokens of the longest, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from trainer.chat_templates.turn_end import turn_end
from trainer.errors import InputError
from trainer.recipe import Recipe
from trainer.run.events import SampleText
from trainer.tasks.lm_head_loss import TargetHead

Agree = Callable[[bool], bool]
"""Returns True if any rank that shares the forward passes still has unfinished texts; the argument is this rank's
answer."""

SPARE_TOKENS = 4
"""Tokens decoded in addition to one per byte of a stop string, for tokens that produce no text."""

SHOWN_CHARACTERS = 1000


class SamplingPrompt(NamedTuple):
    """A prompt of the data. ``tokens``: the tokens before the answer; ``answer``: the tokens of the answer."""

    sample_id: str
    tokens: list[int]
    answer: list[int]


def prompts_of(batch: Any, answer: int = -1) -> list[SamplingPrompt]:
    """Returns the prompts of a micro-batch with one sample per row. ``answer``: index of the run of targets that is the
    answer; the last run by default."""
    found = []
    for row, sample_id in enumerate(batch.sample_ids):
        marked = batch.targets[row].nonzero()[0]
        run = np.split(marked, (np.diff(marked) > 1).nonzero()[0] + 1)[answer]
        start, end = int(run[0]), int(run[-1]) + 1
        ids = batch.input_ids[row]
        found.append(SamplingPrompt(sample_id, ids[:start].tolist(), ids[start:end].tolist()))
    return found


@dataclass
class Completion:
    """A sampled text. ``tokens``: with the end-of-text token, if it was sampled. ``ended``: True if the text ended by
    that token or by a stop string. ``words``: the text that the reward is computed for."""

    tokens: list[int] = field(default_factory=list)
    ended: bool = False
    words: str = ""


def shown(prompt: SamplingPrompt, words: str, tokenizer: Any) -> SampleText:
    """Returns a text for an event, with its prompt and the data's answer. Long values are cut: a prompt keeps its end,
    the others keep their beginning."""
    question, answer = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt.tokens, prompt.answer))
    return SampleText(
        sample=prompt.sample_id,
        prompt=question[-SHOWN_CHARACTERS:],
        text=words[:SHOWN_CHARACTERS],
        reference=answer[:SHOWN_CHARACTERS],
    )


def uniforms(key: str, count: int) -> npt.NDArray[np.float64]:
    """Returns the random numbers of one text, in [0, 1). They depend on ``key`` only."""
    digest = hashlib.sha256(f"rollout:{key}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big"))).random(count)


def drawn(logits_BV: torch.Tensor, uniform_B: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """Returns a token for each row: the one at which the cumulative distribution passes the row's number. The
    distribution is restricted to the smallest set of most likely tokens whose probabilities add up to ``top_p``
    (Holtzman et al. 2019, arXiv:1904.09751). At a temperature of 0, returns the most likely token."""
    if temperature == 0.0:
        return logits_BV.argmax(-1)
    probabilities, order = (logits_BV.double() / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    cumulative = probabilities.cumsum(-1)
    kept = cumulative - probabilities < top_p
    reached = (cumulative * kept).amax(-1, keepdim=True)
    place = ((cumulative <= uniform_B[:, None].double() * reached) & kept).sum(-1, keepdim=True)
    last = kept.sum(-1, keepdim=True) - 1
    return order.gather(-1, torch.minimum(place, last))[:, 0]


class PolicySampler:
    """Samples completions. ``stop``: strings that end a text, in addition to the end of text. ``agree``: see `Agree`;
    under strategies that gather parameters for a forward, every rank must run the same number of forwards."""

    def __init__(
        self,
        model: Any,
        head: TargetHead,
        tokenizer: Any,
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        stop: Sequence[str],
        agree: Agree,
    ) -> None:
        self.head, self.tokenizer, self.agree = head, tokenizer, agree
        self.max_new_tokens, self.temperature, self.top_p, self.stop = max_new_tokens, temperature, top_p, stop
        self.ends = end_tokens(model, tokenizer)
        if not self.ends:  # no text would ever end
            raise InputError(
                "neither the tokenizer nor the model names an end-of-text token, which generating texts needs"
            )
        self.positions = max_positions(model)
        self._window = max((len(s.encode()) for s in stop), default=0) + SPARE_TOKENS

    @torch.no_grad()
    def write(
        self, module: torch.nn.Module, prompts: Sequence[Sequence[int]], keys: Sequence[str], device: torch.device
    ) -> list[Completion]:
        """Returns a completion for each prompt. Without prompts, this rank only takes part in the forward passes of
        the other ranks."""
        self._check_room(prompts)
        rows = prompts or [[0]]
        texts = [Completion() for _ in prompts]
        draws = torch.tensor(np.array([uniforms(key, self.max_new_tokens) for key in keys or [""]])).to(device)
        ids, mask = padded_left(rows, 0, device)
        positions, cache = (mask.cumsum(-1) - 1).clamp(min=0), None
        going = list(range(len(prompts)))
        for n in range(self.max_new_tokens):
            if not self.agree(bool(going)):
                break
            output = self.head.last_logits(
                module,
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
            cache = output.past_key_values
            chosen = drawn(output.logits[:, -1], draws[:, n], self.temperature, self.top_p)
            going = self._add(texts, going, chosen.tolist())
            ids, positions = chosen[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], -1)
        for text in texts:
            words = self.tokenizer.decode(text.tokens, skip_special_tokens=True)
            cuts = [words.index(string) for string in self.stop if string in words]
            text.words = words[: min(cuts)] if cuts else words
        return texts

    def _add(self, texts: list[Completion], going: list[int], chosen: list[int]) -> list[int]:
        """Appends the chosen tokens. Returns the rows that have not ended."""
        for row in going:
            text = texts[row]
            text.tokens.append(chosen[row])
            tail = self.tokenizer.decode(text.tokens[-self._window :], skip_special_tokens=True) if self.stop else ""
            text.ended = chosen[row] in self.ends or any(string in tail for string in self.stop)
        return [row for row in going if not texts[row].ended]

    def _check_room(self, prompts: Sequence[Sequence[int]]) -> None:
        longest = max(map(len, prompts), default=0)
        if self.positions and longest + self.max_new_tokens > self.positions:
            raise InputError(
                f"a prompt of {longest} tokens and ppo.max_new_tokens {self.max_new_tokens} are more than the model's "
                f"{self.positions} positions; lower it, or data.sequence_length"
            )


def padded_left(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the token ids and the attention mask [B, P] of prompts that all end in the last column."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def max_positions(model: Any) -> int | None:
    """Returns the longest text that the model was made for, in tokens; None if its configuration has no limit."""
    text = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    positions: int | None = getattr(text, "max_position_embeddings", None)
    return positions


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Returns the tokens that end a text: the tokenizer's end of text, which training puts after each answer, and those
    of the model's generation configuration, and the one that the chat template writes after a turn."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    several = configured if isinstance(configured, list) else [configured]
    return {int(n) for n in (tokenizer.eos_token_id, *several, *turn_end(tokenizer).tokens) if n is not None}


def stop_strings(recipe: Recipe, tokenizer: Any) -> tuple[str, ...]:
    """Returns the texts that the chat template writes after a turn, if it frames the recipe's rows."""
    return turn_end(tokenizer).strings if recipe.data.has_chats else ()
