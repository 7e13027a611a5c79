"""Texts that a run generates before its first step and after its last one, greedily and from the same prompts, to show
what training has changed.

Every rank generates the same texts, and rank 0 stores them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainer.data import Batch, PreparedDataset, eval_batches
from trainer.run.events import TextsEvent
from trainer.tasks.sampling import PolicySampler, SamplingPrompt, prompts_of, shown
from trainer.worker.build import Parts
from trainer.worker.callbacks import Callback, Position
from trainer.worker.recorder import Recorder
from trainer.worker.texts.generation import Generation

if TYPE_CHECKING:
    from trainer.data import DiskCache

log = logging.getLogger(__name__)

BEFORE, AFTER = "before", "after"


@dataclass(frozen=True)
class PromptSource:
    """The source of prompts: the first samples of the evaluation data, if any. ``tokenizer`` loads the model's."""

    data: PreparedDataset | None
    cache: DiskCache | None
    tokenizer: Callable[[], Any]

    def samples(self, count: int) -> Batch | None:
        """Returns the first ``count`` samples, one per row."""
        assert self.data is not None
        return next(eval_batches(self.data, count, 0, 1, cache=self.cache, singly=True, limit=count), None)


class SampleTexts(Callback):
    """``on_phase(step, phase)`` is called for each token, so that a slow model is not taken for a hang."""

    def __init__(
        self,
        parts: Parts,
        recorder: Recorder,
        source: PromptSource,
        on_phase: Callable[[int, str], None],
    ) -> None:
        self.recipe, self.world, self.strategy = parts.recipe, parts.world, parts.strategy
        self.recorder, self.source, self._step = recorder, source, 0
        self.generation = Generation(parts, self.recipe.samples.max_new_tokens, lambda: on_phase(self._step, "samples"))
        self._over = not self.recipe.samples.count or parts.task.head is None or source.data is None
        self._prompts: list[SamplingPrompt] | None = None

    def on_start(self, position: Position) -> None:
        if position.step == 0:
            self.write(0)

    def on_last_step(self, step: int) -> None:
        self.write(step)

    def write(self, step: int) -> None:
        """Collective, before the first step (as step 0) or after the last one. A failure is a warning and ends the
        samples, not the run."""
        if self._over:
            return
        self._step = step
        event = self.generation.attempt(lambda: self._texts(step))
        if self.generation.failure is not None:
            self._over = True
            if self.world.is_rank0:
                log.warning("no more sample texts are stored: %s", self.generation.failure)
        elif event is not None:
            self.recorder.event(event, wait=False)

    def _texts(self, step: int) -> TextsEvent | None:
        """Returns None if no prompt fits, or if an earlier attempt has stored the texts before training."""
        began = time.monotonic()
        when = BEFORE if step == 0 else AFTER
        if when == BEFORE and self.world.decide_on_rank0(
            lambda: any(isinstance(e, TextsEvent) and e.when == BEFORE for e in self.recorder.earlier_events())
        ):
            return None
        tokenizer = self.source.tokenizer()
        author = self.generation.sampler(tokenizer)
        if self._prompts is None:
            self._prompts = self.world.decide_on_rank0(lambda: self._fitting(author))
        prompts, module = self._prompts, self.strategy.module
        if not prompts:
            return None
        with self.generation.mode():
            texts = author.write(module, [p.tokens for p in prompts], [p.sample_id for p in prompts], self.world.device)
        told = tuple(shown(prompt, text.words, tokenizer) for prompt, text in zip(prompts, texts, strict=True))
        return TextsEvent(step=step, when=when, seconds=time.monotonic() - began, texts=told)

    def _fitting(self, author: PolicySampler) -> list[SamplingPrompt]:
        batch = self.source.samples(self.recipe.samples.count)
        data, length = self.recipe.data, author.max_new_tokens
        longest = min(data.sequence_length, author.positions or data.sequence_length) - length
        room = self.recipe.training.micro_batch * data.sequence_length
        return fitting(prompts_of(batch, 0) if batch else [], longest, room, length)


def fitting(prompts: Sequence[SamplingPrompt], longest: int, room: int, more: int) -> list[SamplingPrompt]:
    """Returns the first distinct prompts of at most ``longest`` tokens that fit into ``room`` tokens, padded to the
    longest of them, each with ``more`` tokens for its answer."""
    found: list[SamplingPrompt] = []
    for prompt in prompts:
        width = max(len(p.tokens) for p in [*found, prompt]) + more
        again = any(p.tokens == prompt.tokens for p in found)
        if not again and len(prompt.tokens) <= longest and width * (len(found) + 1) <= room:
            found.append(prompt)
    return found
