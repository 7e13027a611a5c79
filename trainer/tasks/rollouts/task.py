"""A task that learns from rollouts: texts, rewards, advantages, updates. See the package."""

from __future__ import annotations

import logging
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trainer.recipe.sections.rollouts.task import RolloutTaskSection
from trainer.run.events import SampleText
from trainer.tasks.base import GenerationContext, Task, Update
from trainer.tasks.environments.environments import Environments
from trainer.tasks.reference import adapter_off
from trainer.tasks.rollouts.engine import ModelEngine, ServerEngine, Texts, TextServers
from trainer.tasks.rollouts.policy import PolicyHead
from trainer.tasks.rollouts.ranks import Peers
from trainer.tasks.rollouts.rollout import Experience, PromptCompletionBatch, Rollout, RolloutMicroBatch
from trainer.tasks.rollouts.scoring import Scoring
from trainer.tasks.rollouts.store import RolloutStore
from trainer.tasks.rollouts.turns import TurnLimits, TurnWriter
from trainer.tasks.rollouts.writer import Prompt, Prompts, Request, RolloutWriter
from trainer.tasks.sampling import PolicySampler, max_positions, prompts_of, shown, stop_strings

if TYPE_CHECKING:
    from trainer.data import Batch, StepPlan

log = logging.getLogger(__name__)

EXAMPLES = 2


class RolloutTask(Task):
    """``rewrites``: see `Request`."""

    prepares_steps = True
    generates = True
    rewrites = 0

    generation: GenerationContext

    @property
    def section(self) -> RolloutTaskSection:
        section = self.recipe.rollout_section
        assert section is not None
        return section

    def attach(self, model: Any, generation: GenerationContext | None = None) -> None:
        self._scoring = Scoring(self.section, self.recipe.task, generation) if generation else None
        if self._scoring:
            self._scoring.attach(model)
        self._model, self._policy = model, self.policy_head(model)
        self.head = self._policy
        without_dropout(model)
        if self.recipe.adapter.dropout:
            no_effect = "adapter.dropout %g has no effect: task %s trains without dropout"
            log.warning(no_effect, self.recipe.adapter.dropout, self.recipe.task)
        self._writer: RolloutWriter | None = None
        self._store: RolloutStore | None = None
        if generation is not None:
            self.generation, self._ranks = generation, Peers(generation.world)
            self._writer = self._make_writer(generation)
        self._ahead: dict[int, tuple[Request, Callable[[], Texts]]] = {}
        self._step = 0

    def policy_head(self, model: Any) -> PolicyHead:
        """Returns the head that gives the statistics of texts; it may add modules to the model."""
        section = self.section
        return PolicyHead(model, section.temperature, self.recipe.task, entropy=section.entropy_coef > 0)

    def _make_writer(self, generation: GenerationContext) -> RolloutWriter:
        section = self.section
        self.sampler = PolicySampler(
            self._model,
            self._policy,
            generation.tokenizer,
            max_new_tokens=section.max_new_tokens,
            temperature=section.temperature,
            top_p=section.top_p,
            stop=(*section.stop, *stop_strings(self.recipe, generation.tokenizer)),
            # A forward that gathers parameters is run by all ranks, as long as one has texts to write.
            agree=lambda going: self._ranks.any(going) if generation.forward_is_collective else going,
            setting=f"{self.recipe.task}.max_new_tokens",
        )
        assert self._scoring is not None
        engine, model = ModelEngine(self.sampler), (self._model, self._policy)
        return RolloutWriter(engine, self._scoring, self._ranks, *model, self.penalty, self._turns())

    def _turns(self) -> TurnWriter | None:
        """Starts the recipe's environment, and returns what continues texts with it."""
        section, dialogue = self.section, self.generation.dialogue
        if section.environment is None:
            return None
        assert dialogue is not None
        how = section.environment_processes, section.environment_timeout_s, f"{self.recipe.task}.environment"
        environments = Environments(section.environment, *how)
        return TurnWriter(
            environments, dialogue, self.sampler, TurnLimits(section.max_turns, section.longest), self._ranks
        )

    def write_with(self, servers: TextServers, store: RolloutStore) -> None:
        """Lets servers write the texts, which ``store`` keeps. Called before the first step."""
        assert self._writer is not None
        self._writer.engine, self._store = ServerEngine(servers, self.sampler), store

    def owns_parameter(self, name: str) -> bool:
        return self._scoring is not None and self._scoring.owns_parameter(name)

    def init_parameter(self, name: str, shape: torch.Size) -> torch.Tensor:
        assert self._scoring is not None
        return self._scoring.init_parameter(name)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def loss_units(self, of: StepPlan | Batch) -> int:
        return of.samples

    def penalty(self, rollout: Rollout) -> float:
        """Returns what is subtracted from the reward of a text."""
        return 0.0 if rollout.ended else self.section.missing_eos_penalty

    @abstractmethod
    def experience(self, rollouts: Sequence[Rollout]) -> Experience:
        """Returns the rollouts of a step, of all ranks, with what the losses need; the same on every rank."""

    def needs_policy(self) -> bool:
        """Returns True if the rollouts need their log-probabilities before the first update of a step."""
        return True

    def needs_reference(self) -> bool:
        """Returns True if the rollouts need their log-probabilities under the reference."""
        return True

    @property
    def steps_ahead(self) -> int:
        return self.recipe.rollout.max_staleness

    def prepare_step(
        self, module: torch.nn.Module, batches: Sequence[Batch], device: torch.device, step: int = 0
    ) -> None:
        assert self._writer is not None
        self._step, began = step, time.monotonic()
        request, store = self._request(batches, step), self._store
        mine = store.load(step, self._ranks, request.prompts, self.section.answers) if store else None
        if mine is None:
            begun = self._ahead.pop(step, None) or (request, self._writer.begin(module, device, request))
            mine = self._writer.finish(module, device, *begun)
            if store:
                store.save(step, self._ranks, [rollout for some in mine for rollout in some])
        waited_s = time.monotonic() - began
        self._score_tokens(module, mine, device)
        self._experience = self.experience(self._ranks.joined([rollout for some in mine for rollout in some]))
        self._metrics = {**self._experience.metrics(), "rollout_s": waited_s}
        if self.section.environment:
            self._metrics["turns"] = float(np.mean([1 + len(r.given) for r in self._experience.rollouts]))
        if store:
            stale = [step - 1 - rollout.version for rollout in self._experience.rollouts]
            self._metrics |= {"staleness": float(np.mean(stale)), "staleness_max": float(max(stale))}

    def prepare_ahead(self, module: torch.nn.Module, batches: Sequence[Batch], device: torch.device, step: int) -> None:
        assert self._writer is not None
        if step not in self._ahead and not (self._store and step in self._store.steps_before(self._ranks)):
            request = self._request(batches, step)
            self._ahead[step] = request, self._writer.begin(module, device, request)

    def _request(self, batches: Sequence[Batch], step: int) -> Request:
        """Returns the request for the texts of a step, by the weights before the updates of ``self._step``."""

        def key(prompt: int, answer: int, sample: str) -> str:
            return f"{self.recipe.seed}:{step}:{prompt}/{answer}:{sample}"

        prompts = self._prompts(batches)
        return Request(prompts, self.section.answers, key, self._step - 1, f"step {step}", self.rewrites)

    def _prompts(self, batches: Sequence[Batch]) -> Prompts:
        size = self.recipe.training.micro_batch
        return [
            [Prompt(batch.index * size + row, prompt) for row, prompt in enumerate(prompts_of(batch))]
            for batch in batches
        ]

    def _score_tokens(
        self, module: torch.nn.Module, batches: Sequence[Sequence[Rollout]], device: torch.device
    ) -> None:
        """Collective: every rank has as many ``batches``, and runs as many forward passes."""
        size = self.recipe.training.micro_batch
        cuts = [some[n * size : (n + 1) * size] for some in batches for n in range(self.section.answers)]
        texts = [PromptCompletionBatch.of_rollouts(some, n) for n, some in enumerate(cuts)]
        if self.needs_policy():
            for some, batch in zip(cuts, texts, strict=True):
                stats = self._policy.score_tokens(module, batch, device)
                _split_rows(some, "logps", stats.logps)
                if stats.values is not None:
                    _split_rows(some, "values", stats.values)
        if self.needs_reference():
            with adapter_off(self._model):
                for some, batch in zip(cuts, texts, strict=True):
                    _split_rows(some, "reference", self._policy.score_tokens(module, batch, device).logps)

    def updates(self, step: int, plan: StepPlan, batches: Sequence[Batch]) -> Iterator[Update]:
        section, size, experience = self.section, self.recipe.training.micro_batch, self._experience
        rank, ranks = self._ranks.here
        for epoch in range(section.epochs):
            for part in experience.parts(section.minibatches, f"{self.recipe.seed}:{step}:{epoch}"):
                moving = experience.moving(part)
                cuts = [moving[start : start + size] for start in range(0, len(moving), size)]
                mine = [experience.micro_batch(cut, n) for n, cut in enumerate(cuts) if n % ranks == rank]
                rounds = max(1, -(-len(cuts) // ranks))
                nothing = [experience.micro_batch(part[:0], -1)] * (rounds - len(mine))
                yield Update(mine + nothing, experience.units(part))

    def example_rollouts(self) -> list[SampleText]:
        return [
            replace(
                shown(rollout.prompt, rollout.words, self.generation.tokenizer),
                reward=rollout.score,
                kl=rollout.kl if self.needs_policy() and self.needs_reference() else None,
                ended=rollout.ended,
            )
            for rollout in self._experience.rollouts[:EXAMPLES]
        ]

    def evaluated(self, module: torch.nn.Module, batch: Batch, device: torch.device, answers: int) -> list[Rollout]:
        """Collective: returns texts for the held-out prompts of a batch, with their rewards. The random numbers depend
        on the sample only, so that every evaluation draws the same ones."""
        assert self._writer is not None

        def key(_: int, answer: int, sample: str) -> str:
            return f"{self.recipe.seed}:evaluation:{sample}" + (f":{answer}" if answer else "")

        request = Request(self._prompts([batch]), answers, key, self._step, "evaluation")
        (rollouts,) = self._writer.finish(module, device, request, self._writer.begin(module, device, request))
        return rollouts

    def dummy_batch(self, batch: Batch) -> RolloutMicroBatch:
        """Returns a micro-batch that learns from every target, with rows longer by the longest texts."""
        more, positions = self.section.longest, max_positions(self._model)
        if self.section.environment and positions:
            more = max(1, min(more, positions - batch.input_ids.shape[1]))
        longer = ((0, 0), (0, more))
        targets = np.pad(batch.targets, longer, constant_values=bool(batch.targets.any()))
        ids, places = (np.pad(a, longer) for a in (batch.input_ids, batch.position_ids))
        return self.dummy_micro_batch(PromptCompletionBatch(batch.index, ids, places, targets, batch.sample_ids))

    @abstractmethod
    def dummy_micro_batch(self, texts: PromptCompletionBatch) -> RolloutMicroBatch:
        """Returns a micro-batch of these texts in which everything else is zero."""


def without_dropout(model: Any) -> None:
    """Switches dropout off: otherwise a ratio of probabilities would compare two random models."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0


def _split_rows(rollouts: Sequence[Rollout], name: str, flat: torch.Tensor) -> None:
    """Sets the field ``name`` of each rollout to the part of ``flat`` [T] of its own tokens."""
    values = flat.double().cpu().numpy()
    ends = np.cumsum([r.length for r in rollouts])
    for rollout, part in zip(rollouts, np.split(values, ends[:-1]) if len(rollouts) else [], strict=True):
        setattr(rollout, name, part)
