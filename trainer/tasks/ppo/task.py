"""The PPO task: each iteration generates texts, computes their rewards, and updates the policy.

With q the ratio of a token's probability to its probability when the text was generated, A its advantage
(`advantages`), V the value before it, R = A + V_old its return and H the entropy, the loss of an update is the mean
over the T tokens of its texts:

    1/T Σ max(-A q, -A clip(q, 1 - ε, 1 + ε))
          + value_coef · ½ max((V - R)², (clip(V, V_old - ε_v, V_old + ε_v) - R)²) - entropy_coef · H

Policy and reference are one model, with its adapter switched on and off. Dropout is disabled everywhere: otherwise a
ratio would compare two random models.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import torch

from trainer.errors import RewardFailed
from trainer.recipe.sections.reward import MODEL
from trainer.records import read_record
from trainer.run.events import SampleText
from trainer.tasks.base import GenerationContext, LossOutput, Task, Update, ratio
from trainer.tasks.inputs import to_device
from trainer.tasks.ppo.advantages import adapted_kl_coef
from trainer.tasks.ppo.losses import policy_loss, value_loss
from trainer.tasks.ppo.policy import VALUE_HEAD, PolicyHead, first_value
from trainer.tasks.ppo.rollouts import Experience, PPOMicroBatch, PromptCompletionBatch, Rollout
from trainer.tasks.reference import adapter_off
from trainer.tasks.rewards.functions import RewardFunctions, weighted
from trainer.tasks.rewards.models import ModelRater, SharedReward
from trainer.tasks.sampling import PolicySampler, prompts_of, shown, stop_strings

if TYPE_CHECKING:
    from trainer.data import Batch, StepPlan

log = logging.getLogger(__name__)

EXAMPLES = 2
EVALUATION = "evaluation"
Key = Callable[[str, str], str]
"""Returns the key of a text's random numbers from its place in the step and its prompt's sample id."""


class _PPOState(TypedDict):
    kl_coef: float


class PPO(Task):
    prepares_steps = True
    generates = True
    extra_module = VALUE_HEAD

    generation: GenerationContext

    def attach(self, model: Any, generation: GenerationContext | None = None) -> None:
        section = self.recipe.ppo
        self._model, self._kl_coef = model, section.kl_coef
        self._shared: SharedReward | None = None
        if generation and isinstance(generation.reward, SharedReward):
            self._shared = generation.reward
            self._shared.attach(model)
        self.head = self._policy = PolicyHead(model, section.temperature, self.recipe.seed)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0
        if self.recipe.adapter.dropout:
            log.warning(
                "adapter.dropout %g has no effect: task ppo trains without dropout", self.recipe.adapter.dropout
            )
        if generation is not None:
            self.generation = generation
            if section.reward.rows:
                self._functions = RewardFunctions(section.reward.rows, section.reward.processes)
            self._author = PolicySampler(
                model,
                self._policy,
                generation.tokenizer,
                max_new_tokens=section.max_new_tokens,
                temperature=section.temperature,
                top_p=section.top_p,
                stop=(*section.stop, *stop_strings(self.recipe, generation.tokenizer)),
                agree=self._agree,
            )

    def owns_parameter(self, name: str) -> bool:
        return name.startswith(f"{VALUE_HEAD}.") or (self._shared is not None and self._shared.owns_parameter(name))

    def init_parameter(self, name: str, shape: torch.Size) -> torch.Tensor:
        if self._shared is not None and self._shared.owns_parameter(name):
            return self._shared.init_parameter(name)
        return first_value(name, shape, self.recipe.seed)

    def loss_units(self, of: StepPlan | Batch) -> int:
        return of.samples

    def _agree(self, going: bool) -> bool:
        """Returns True if any rank passes True. Collective if a forward is; otherwise returns ``going``."""
        world = self.generation.world
        return (
            going
            if world is None or not self.generation.forward_is_collective
            else bool(world.all_reduce_sum([float(going)])[0])
        )

    def prepare_step(
        self, module: torch.nn.Module, batches: Sequence[Batch], device: torch.device, step: int = 0
    ) -> None:
        rollouts: list[Rollout] = []
        failure: RewardFailed | None = None
        try:
            rollouts = self._rollouts(
                module, batches, device, lambda place, sample: f"{self.recipe.seed}:{step}:{place}:{sample}"
            )
        except RewardFailed as error:
            failure = error
        world = self.generation.world
        by_rank = world.all_gather((rollouts, failure)) if world else [(rollouts, failure)]
        for rank, (_, failed) in enumerate(by_rank):  # raised on all ranks, so that none waits for another
            if failed is not None:
                raise RewardFailed(f"step {step}, rank {rank}: {failed}") from failure
        self._experience = Experience([r for some, _ in by_rank for r in some], self.recipe.ppo, self._kl_coef)
        self._metrics = {**self._experience.metrics(), "kl_coef": self._kl_coef}
        self._adapt_kl_coef()

    def _adapt_kl_coef(self) -> None:
        section = self.recipe.ppo
        if section.kl_target is not None:
            texts = len(self._experience.rollouts)
            self._kl_coef = adapted_kl_coef(
                self._kl_coef, self._experience.kl, section.kl_target, texts, section.kl_horizon
            )

    def _rollouts(
        self, module: torch.nn.Module, batches: Sequence[Batch], device: torch.device, key: Key
    ) -> list[Rollout]:
        """Returns the rollouts of this rank, with their scores. Every rank calls it, with as many ``batches``.

        Raises RewardFailed."""
        by_batch = [self._written(module, batch, device, key) for batch in batches]
        rows = [
            PromptCompletionBatch.of([(r.prompt.tokens, r.tokens) for r in some], n, [])
            for n, some in enumerate(by_batch)
        ]
        # All forward passes before the first reward: a reward may fail while other ranks wait in a forward.
        for texts, some in zip(rows, by_batch, strict=True):
            stats = self._policy.score_tokens(module, texts, device)
            _split_rows(some, "logps", stats.logps)
            _split_rows(some, "values", stats.values)
        with adapter_off(self._model):
            for texts, some in zip(rows, by_batch, strict=True):
                _split_rows(some, "reference", self._policy.score_tokens(module, texts, device).logps)
        by_model = [self._model_scores(some, module, device) for some in by_batch]
        for some, rated in zip(by_batch, by_model, strict=True):
            for rollout, score in zip(some, self._scores(some, rated), strict=True):
                rollout.score = score - (0.0 if rollout.ended else self.recipe.ppo.missing_eos_penalty)
        return [rollout for some in by_batch for rollout in some]

    def _written(self, module: torch.nn.Module, batch: Batch, device: torch.device, key: Key) -> list[Rollout]:
        prompts = prompts_of(batch)
        keys = [key(f"{batch.index}/{row}", prompt.sample_id) for row, prompt in enumerate(prompts)]
        texts = self._author.write(module, [prompt.tokens for prompt in prompts], keys, device)
        return [
            Rollout((batch.index, row), prompt, text.tokens, text.ended, text.words)
            for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
        ]

    def _model_scores(self, rollouts: Sequence[Rollout], module: torch.nn.Module, device: torch.device) -> list[float]:
        """Returns the scores of the reward model, empty without one. Every rank calls it for each micro-batch."""
        if self._shared is not None:
            return self._shared.rate(self._model, self._policy, module, rollouts, device)
        rater: ModelRater | None = self.generation.reward
        if rater is None:
            return []
        prompts = [self._text(r.prompt.tokens) for r in rollouts]
        return rater(prompts, [r.words for r in rollouts], [r.ended for r in rollouts])

    def _scores(self, rollouts: Sequence[Rollout], by_model: Sequence[float]) -> list[float]:
        """Returns the weighted sum of all rewards of each text. Raises RewardFailed."""
        section, rewards = self.recipe.ppo.reward, dict[str, Sequence[float]]()
        if section.model is not None:
            for rollout, score in zip(rollouts, by_model, strict=True):
                if not math.isfinite(score):
                    raise RewardFailed(f"{section.model} rates the text {rollout.words!r:.200} {score}")
            rewards[MODEL] = by_model
        if section.rows:
            prompts = [self._text(r.prompt.tokens) for r in rollouts]
            references = [self._text(r.prompt.answer) for r in rollouts]
            rewards |= self._functions(prompts, [r.words for r in rollouts], references)
        return weighted(rewards, section.weights)

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.generation.tokenizer.decode(list(ids), skip_special_tokens=True))

    def updates(self, step: int, plan: StepPlan, batches: Sequence[Batch]) -> Iterator[Update]:
        section, size, experience = self.recipe.ppo, self.recipe.training.micro_batch, self._experience
        world = self.generation.world
        rank, ranks = (world.rank, world.size) if world else (0, 1)
        for epoch in range(section.epochs):
            for part in experience.parts(section.minibatches, f"{self.recipe.seed}:{step}:{epoch}"):
                cuts = [part[start : start + size] for start in range(0, len(part), size)]
                mine = [experience.learnt(cut, n) for n, cut in enumerate(cuts) if n % ranks == rank]
                rounds = -(-len(cuts) // ranks)
                yield Update(mine + [PPOMicroBatch.empty()] * (rounds - len(mine)), experience.tokens(part))

    def loss(self, module: torch.nn.Module, batch: PPOMicroBatch, device: torch.device) -> LossOutput:
        section = self.recipe.ppo
        stats = self._policy.score_tokens(module, batch.texts, device)
        old_logps, old_values, advantages, returns = (
            to_device(a, device) for a in (batch.logps, batch.values, batch.advantages, batch.returns)
        )
        of_policy, clipped = policy_loss(stats.logps, old_logps, advantages, section.clip_range)
        of_value = value_loss(stats.values, old_values, returns, section.value_clip_range)
        loss = of_policy + section.value_coef * of_value - section.entropy_coef * stats.entropies
        moved = stats.logps.detach() - old_logps
        return LossOutput(
            loss.sum(),
            {
                "updated_tokens": torch.tensor(len(old_logps), device=device),
                "policy_loss": of_policy.sum().detach(),
                "value_loss": of_value.sum().detach(),
                "entropy": stats.entropies.sum().detach(),
                "clip_fraction": clipped.sum(),
                "approx_kl": (moved.exp() - 1.0 - moved).sum(),
            },
        )

    def step_metrics(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Returns the metrics of the texts, and means over the tokens of all updates. ``approx_kl``: divergence of the
        policy from the policy that generated the texts (k3)."""
        tokens = max(1.0, float(sums["updated_tokens"]))
        of_updates = {name: float(value) / tokens for name, value in sums.items() if name != "updated_tokens"}
        return {**self._metrics, **of_updates}

    def example_rollouts(self) -> list[SampleText]:
        return [
            replace(
                shown(rollout.prompt, rollout.words, self.generation.tokenizer),
                reward=rollout.score,
                kl=rollout.kl,
                ended=rollout.ended,
            )
            for rollout in self._experience.rollouts[:EXAMPLES]
        ]

    def state(self) -> dict[str, Any]:
        return {"kl_coef": self._kl_coef}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._kl_coef = read_record(_PPOState, state)["kl_coef"]

    def eval_loss(self, module: torch.nn.Module, batch: Batch, device: torch.device) -> LossOutput:
        """Returns the loss of texts generated for held-out prompts: kl_coef · KL - reward per text, with the recipe's
        ``kl_coef``. The random numbers depend on the sample only, so that every evaluation draws the same ones."""
        rollouts = self._rollouts(
            module, [batch], device, lambda place, sample: f"{self.recipe.seed}:{EVALUATION}:{sample}"
        )
        numbers: dict[str, list[float]] = {
            "reward": [r.score for r in rollouts],
            "kl": [r.kl for r in rollouts],
            "response_length": [len(r.tokens) for r in rollouts],
            "ended": [r.ended for r in rollouts],
        }
        sums = {name: torch.tensor(float(np.sum(values)), device=device) for name, values in numbers.items()}
        return LossOutput(self.recipe.ppo.kl_coef * sums["kl"] - sums["reward"], sums)

    def metrics(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        names = ("loss", "reward", "kl", "response_length", "ended")
        return {name: ratio(sums, name) for name in names}

    def dummy_batch(self, batch: Batch) -> PPOMicroBatch:
        """Returns a micro-batch that learns from every target, with rows longer by ``ppo.max_new_tokens``."""
        longer = ((0, 0), (0, self.recipe.ppo.max_new_tokens))
        targets = np.pad(batch.targets, longer, constant_values=bool(batch.targets.any()))
        ids, positions = (np.pad(a, longer) for a in (batch.input_ids, batch.position_ids))
        flat = np.zeros(int(targets.sum()), np.float32)
        return PPOMicroBatch(
            PromptCompletionBatch(batch.index, ids, positions, targets, batch.sample_ids), flat, flat, flat, flat
        )


def _split_rows(rollouts: Sequence[Rollout], name: str, flat: torch.Tensor) -> None:
    """Sets the field ``name`` of each rollout to the part of ``flat`` [T] of its own tokens."""
    values = flat.double().cpu().numpy()
    ends = np.cumsum([len(r.tokens) for r in rollouts])
    for rollout, part in zip(rollouts, np.split(values, ends[:-1]) if len(rollouts) else [], strict=True):
        setattr(rollout, name, part)
