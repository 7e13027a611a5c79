"""Texts that a run generates before its first step and after its last one, greedily and from the same prompts, to show
what training has changed.

Every rank generates the same texts, and rank 0 stores them. So all ranks run the same number of forward passes, which
strategies that gather parameters in a forward need, and all ranks notice alike if the model cannot generate.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from trainer.data import Batch, PreparedDataset, eval_batches
from trainer.errors import InputError
from trainer.model.kernels.attention import by_mask
from trainer.run.events import TextsEvent
from trainer.tasks.sampling import PolicySampler, SamplingPrompt, prompts_of, shown, stop_strings
from trainer.worker.build import Parts
from trainer.worker.callbacks import Callback, Position
from trainer.worker.recorder import Recorder

if TYPE_CHECKING:
    from trainer.data import DiskCache

log = logging.getLogger(__name__)

BEFORE, AFTER = "before", "after"
TOLD_CHARACTERS = 300


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
        self.recipe, self.world, self.strategy, self.task = parts.recipe, parts.world, parts.strategy, parts.task
        self.recorder, self.source, self.on_token = recorder, source, on_phase
        self._over = not self.recipe.samples.count or self.task.head is None or source.data is None
        self._failure: str | None = None
        self._prompts: list[SamplingPrompt] | None = None

    def on_start(self, position: Position) -> None:
        if position.step == 0:
            self.write(0)

    def on_last_step(self, step: int) -> None:
        self.write(step)

    def write(self, step: int) -> None:
        """Collective, before the first step (as step 0) or after the last one. A failure is a warning and ends the
        samples, not the run; the rank that fails sends the error instead of its next token."""
        if self._over:
            return
        try:
            event = self._texts(step)
            if self._failure is None:
                self._exchange(None)
        except Exception as error:  # a model's own code may raise anything
            if self._failure is None:
                self._exchange(f"{type(error).__name__}: {error}"[:TOLD_CHARACTERS])
        if self._failure is not None:
            self._over = True
            if self.world.is_rank0:
                log.warning("no more sample texts are stored: %s", self._failure)
        elif event is not None:
            self.recorder.event(event, wait=False)

    def _exchange(self, said: bool | str | None) -> bool:
        """Collective: returns True if a rank still generates and none has failed. A failed rank sends the error's
        text, which every rank keeps."""
        told = self.world.all_gather(said)
        self._failure = next((each for each in told if isinstance(each, str)), None)
        return self._failure is None and True in told

    def _texts(self, step: int) -> TextsEvent | None:
        """Returns None if no prompt fits, or if an earlier attempt has stored the texts before training."""
        began = time.monotonic()
        when = BEFORE if step == 0 else AFTER
        if when == BEFORE and self.world.decide_on_rank0(
            lambda: any(isinstance(e, TextsEvent) and e.when == BEFORE for e in self.recorder.earlier_events())
        ):
            return None
        author, tokenizer = self._author(step)
        if self._prompts is None:
            self._prompts = self.world.decide_on_rank0(lambda: self._fitting(author))
        prompts, module = self._prompts, self.strategy.module
        if not prompts:
            return None
        with self._writing():
            texts = author.write(module, [p.tokens for p in prompts], [p.sample_id for p in prompts], self.world.device)
        told = tuple(shown(prompt, text.words, tokenizer) for prompt, text in zip(prompts, texts, strict=True))
        return TextsEvent(step=step, when=when, seconds=time.monotonic() - began, texts=told)

    def _author(self, step: int) -> tuple[PolicySampler, Any]:
        method = self.recipe.adapter.kind
        if self.recipe.adapter.row.inserts_tokens:
            raise InputError(
                f"texts are generated with a key-value cache, which adapter.method {method} may fill itself"
            )
        tokenizer = self.source.tokenizer()

        def agree(going: bool) -> bool:
            self.on_token(step, "samples")
            return self._exchange(going)

        author = PolicySampler(
            self.strategy.model,
            self.task.head,
            tokenizer,
            max_new_tokens=self.recipe.samples.max_new_tokens,
            temperature=0.0,
            top_p=1.0,
            stop=stop_strings(self.recipe, tokenizer),
            agree=agree,
        )
        return author, tokenizer

    def _fitting(self, author: PolicySampler) -> list[SamplingPrompt]:
        batch = self.source.samples(self.recipe.samples.count)
        data, length = self.recipe.data, author.max_new_tokens
        longest = min(data.sequence_length, author.positions or data.sequence_length) - length
        room = self.recipe.training.micro_batch * data.sequence_length
        return fitting(prompts_of(batch, 0) if batch else [], longest, room, length)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Puts the model into its generating mode, and restores its previous mode afterwards."""
        module, device = self.strategy.module, self.world.device
        eager = torch.compiler.set_stance("force_eager") if self.recipe.compute.compile else nullcontext()
        was_training = module.training
        module.eval()
        try:
            with (
                torch.random.fork_rng([device] if device.type == "cuda" else []),
                by_mask(self.strategy.model),
                eager,
                self.strategy.averaged(),
                self.strategy.autocast(),
            ):
                yield
        finally:
            self.strategy.reshard()
            module.train(was_training)


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
