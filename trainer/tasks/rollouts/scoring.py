"""The rewards of rollouts: the weighted sum of an environment's, functions and a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from trainer.errors import RewardFailed
from trainer.recipe.sections.rollouts.reward import MODEL
from trainer.recipe.sections.rollouts.task import RolloutTaskSection
from trainer.tasks.rewards.functions import RewardFunctions, weighted
from trainer.tasks.rewards.models import ModelRater, SharedReward
from trainer.tasks.rollouts.policy import PolicyHead
from trainer.tasks.rollouts.rollout import Rollout

if TYPE_CHECKING:
    from trainer.tasks.base import GenerationContext


class Scoring:
    """``key``: of the task's section in the recipe."""

    def __init__(self, task: RolloutTaskSection, key: str, generation: GenerationContext) -> None:
        section, self._weights = task.reward, task.weights
        self._section, self._tokenizer, self._rater = section, generation.tokenizer, generation.reward
        self._shared = generation.reward if isinstance(generation.reward, SharedReward) else None
        self._functions: RewardFunctions | None = None
        if section.rows:
            self._functions = RewardFunctions(section.rows, section.processes, f"{key}.reward.function")

    def attach(self, model: Any) -> None:
        """Adds a reward model on the policy's base model to the policy's model."""
        if self._shared is not None:
            self._shared.attach(model)

    def owns_parameter(self, name: str) -> bool:
        return self._shared is not None and self._shared.owns_parameter(name)

    def init_parameter(self, name: str) -> torch.Tensor:
        assert self._shared is not None
        return self._shared.init_parameter(name)

    def score(
        self,
        batches: Sequence[Sequence[Rollout]],
        model: Any,
        head: PolicyHead,
        module: torch.nn.Module,
        device: torch.device,
    ) -> None:
        """Adds the rewards of the rollouts of each micro-batch to those of an environment. Raises RewardFailed. Every
        rank calls it with as many micro-batches: a reward model on the policy's base model runs a forward pass for
        each, also without rollouts."""
        by_model = [score for some in batches for score in self._model_scores(some, model, head, module, device)]
        self._set([rollout for some in batches for rollout in some], by_model)

    def _model_scores(
        self, rollouts: Sequence[Rollout], model: Any, head: PolicyHead, module: torch.nn.Module, device: torch.device
    ) -> list[float]:
        """Returns the scores of the reward model, empty without one."""
        if self._shared is not None:
            return self._shared.rate(model, head, module, rollouts, device)
        if self._rater is None:
            return []
        rater: ModelRater = self._rater
        prompts = [self._text(r.prompt.tokens) for r in rollouts]
        return rater(prompts, [r.words for r in rollouts], [r.ended for r in rollouts])

    def _set(self, rollouts: Sequence[Rollout], by_model: Sequence[float]) -> None:
        rewards: dict[str, Sequence[float]] = {}
        if self._functions is not None:
            prompts = [self._text(r.prompt.tokens) for r in rollouts]
            references = [self._text(r.prompt.answer) for r in rollouts]
            rewards |= self._functions(prompts, [r.words for r in rollouts], references)
        if self._section.model is not None:
            rewards[MODEL] = by_model
            for rollout, score in zip(rollouts, by_model, strict=True):
                if not math.isfinite(score):
                    raise RewardFailed(f"{self._section.model} rates the text {rollout.words!r:.200} {score}")
        for n, rollout in enumerate(rollouts):
            rollout.rewards |= {name: float(values[n]) for name, values in rewards.items()}
        by_name = {name: [rollout.rewards[name] for rollout in rollouts] for name in self._weights}
        for rollout, reward in zip(rollouts, weighted(by_name, self._weights), strict=True):
            rollout.reward = reward

    def _text(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def close(self) -> None:
        if self._functions is not None:
            self._functions.close()
