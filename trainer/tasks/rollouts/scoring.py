"""The rewards of rollouts: of a function or a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from trainer.errors import RewardFailed
from trainer.recipe.sections.reward import RewardSection
from trainer.tasks.ppo.reward_function import Scorer
from trainer.tasks.ppo.reward_models import ModelRater, SharedReward
from trainer.tasks.rollouts.policy import PolicyHead
from trainer.tasks.rollouts.rollout import Rollout

if TYPE_CHECKING:
    from trainer.tasks.base import GenerationContext


class Scoring:
    def __init__(self, section: RewardSection, task: str, generation: GenerationContext) -> None:
        self._section, self._tokenizer, self._model = section, generation.tokenizer, generation.reward
        self._shared = generation.reward if isinstance(generation.reward, SharedReward) else None
        self._function = Scorer(section.function, f"{task}.reward.function") if section.function else None

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
        self, rollouts: Sequence[Rollout], model: Any, head: PolicyHead, module: torch.nn.Module, device: torch.device
    ) -> None:
        """Sets the rollouts' rewards. Raises RewardFailed. Every rank calls it as often: a reward model on the policy's
        base model runs a forward pass, also without rollouts."""
        if self._shared is not None:
            values = self._shared.rate(model, head, module, rollouts, device)
        else:
            words, prompts = [r.words for r in rollouts], [self._text(r.prompt.tokens) for r in rollouts]
            if self._function is None:
                rater: ModelRater = self._model
                values = rater(prompts, words, [r.ended for r in rollouts])
            else:
                values = self._function(prompts, words, [self._text(r.prompt.answer) for r in rollouts])
        for rollout, value in zip(rollouts, values, strict=True):
            if not math.isfinite(value):
                raise RewardFailed(f"{self._section.model} rates the text {rollout.words!r:.200} {value}")
            rollout.reward = value

    def _text(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def close(self) -> None:
        pass
