"""Sampling of completions for a micro-batch of prompts, padded on the left, with a KV cache.

Each row has its own stream of random numbers, one per token, which invert the cumulative distribution. So a text
depends on its micro-batch and its stream, never on the rank that samples it.

Shapes: B prompts, P tokens of the longest, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence, Set
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
    that token or by a stop string. ``words``: the text that the reward is computed for. ``logps``: log-probability of
    each token by an engine other than the model itself. ``version``: steps after which the engine got its weights."""

    tokens: list[int] = field(default_factory=list)
    ended: bool = False
    words: str = ""
    logps: list[float] = field(default_factory=list)
    version: int = 0


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
    probabilities = (logits_BV.double() / temperature).softmax(-1)
    if top_p >= 1.0:  # in the order of the vocabulary: sorting takes longer than everything else here
        cumulative = probabilities.cumsum(-1)
        place = (cumulative <= uniform_B[:, None].double() * cumulative[:, -1:]).sum(-1)
        return place.clamp(max=logits_BV.shape[-1] - 1)
    probabilities, order = probabilities.sort(dim=-1, descending=True, stable=True)
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
        setting: str = "max_new_tokens",
    ) -> None:
        """``setting``: the recipe's name of ``max_new_tokens``, for errors."""
        self.head, self.tokenizer, self.agree = head, tokenizer, agree
        self.max_new_tokens, self.temperature, self.top_p, self.stop = max_new_tokens, temperature, top_p, stop
        self.ends, self.setting = end_tokens(model, tokenizer), setting
        if not self.ends:  # no text would ever end
            raise InputError(
                "neither the tokenizer nor the model names an end-of-text token, which generating texts needs"
            )
        self.positions = max_positions(model)
        self._window = max((len(s.encode()) for s in stop), default=0) + SPARE_TOKENS

    @torch.no_grad()
    def write(
        self,
        module: torch.nn.Module,
        prompts: Sequence[Sequence[int]],
        keys: Sequence[str],
        device: torch.device,
        answers: int = 1,
    ) -> list[Completion]:
        """Returns ``answers`` completions for each prompt, prompt by prompt. ``keys``: one for each completion. Without
        prompts, this rank only takes part in the forward passes of the other ranks."""
        self.check_room(prompts)
        rows = prompts or [[0]]
        batch = _Decoding(rows, device)
        texts = [Completion() for _ in keys]
        draws = torch.tensor(np.array([uniforms(k, self.max_new_tokens) for k in keys or [""] * answers])).to(device)
        going = set(range(len(texts)))
        for n in range(self.max_new_tokens):
            if not self.agree(bool(going)):
                break
            logits = batch.forward(self.head, module)
            if n == 0 and answers > 1:
                if selects_rows(batch.cache):
                    logits = batch.repeat(logits, answers)
                else:
                    batch = _Decoding([row for row in rows for _ in range(answers)], device)
                    logits = batch.forward(self.head, module)
            chosen = drawn(logits, draws[batch.texts, n], self.temperature, self.top_p)
            batch.append(chosen)
            for row, token in zip(batch.texts, chosen.tolist(), strict=True):
                if row in going:
                    self._add(texts[row], token)
            going = {row for row in going if not texts[row].ended}
            batch.keep(going)
        for text in texts:
            text.words = self.words(text.tokens)
        return texts

    def words(self, tokens: Sequence[int]) -> str:
        """Returns the text of a completion, up to a stop string."""
        words: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        cuts = [words.index(string) for string in self.stop if string in words]
        return words[: min(cuts)] if cuts else words

    def _add(self, text: Completion, token: int) -> None:
        text.tokens.append(token)
        tail = self.tokenizer.decode(text.tokens[-self._window :], skip_special_tokens=True) if self.stop else ""
        text.ended = token in self.ends or any(string in tail for string in self.stop)

    def check_room(self, prompts: Sequence[Sequence[int]]) -> None:
        longest = max(map(len, prompts), default=0)
        if self.positions and longest + self.max_new_tokens > self.positions:
            raise InputError(
                f"a prompt of {longest} tokens and {self.setting} {self.max_new_tokens} are more than the model's "
                f"{self.positions} positions; lower it, or data.sequence_length"
            )


class _Decoding:
    """The rows of one `PolicySampler.write`, with their cache. ``texts``: the text of each row, by its number."""

    def __init__(self, prompts: Sequence[Sequence[int]], device: torch.device) -> None:
        self.ids, self.mask = padded_left(prompts, 0, device)
        self.positions = (self.mask.cumsum(-1) - 1).clamp(min=0)
        self.texts = list(range(len(prompts)))
        self.cache: Any = None

    def forward(self, head: TargetHead, module: torch.nn.Module) -> torch.Tensor:
        """Returns the logits [B, V] of the next tokens."""
        output = head.last_logits(
            module,
            input_ids=self.ids,
            attention_mask=self.mask,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.cache = output.past_key_values
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    def repeat(self, logits_BV: torch.Tensor, answers: int) -> torch.Tensor:
        """Makes ``answers`` rows of each prompt's row, after the prompts' forward."""
        self.cache.batch_repeat_interleave(answers)
        self.mask, self.positions = (t.repeat_interleave(answers, 0) for t in (self.mask, self.positions))
        self.texts = list(range(len(self.texts) * answers))
        return logits_BV.repeat_interleave(answers, 0)

    def append(self, tokens_B: torch.Tensor) -> None:
        self.ids, self.positions = tokens_B[:, None], self.positions[:, -1:] + 1
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], -1)

    def keep(self, going: Set[int]) -> None:
        """Drops the rows of texts that have ended, once they are an eighth of the rows."""
        rows = [n for n, text in enumerate(self.texts) if text in going] or [0]
        # Often: to copy the cache without them takes as long as to append one token to it.
        if len(rows) > len(self.texts) * 7 // 8 or not selects_rows(self.cache):
            return
        kept = torch.tensor(rows, device=self.ids.device)
        self.cache.batch_select_indices(kept)
        self.ids, self.mask, self.positions = self.ids[kept], self.mask[kept], self.positions[kept]
        self.texts = [self.texts[n] for n in rows]


def selects_rows(cache: Any) -> bool:
    """Returns True if rows of the cache can be repeated and dropped; a layer of linear attention cannot."""
    layers = getattr(cache, "layers", ())
    return bool(layers) and all(hasattr(layer, "batch_select_indices") for layer in layers)


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
