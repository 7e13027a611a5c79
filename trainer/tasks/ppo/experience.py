"""What PPO makes of the rollouts of an iteration: advantages and returns.

Legend: R tokens of a text, T tokens of the texts of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer.recipe.sections.rollouts.ppo import PPOSection
from trainer.tasks.ppo.advantages import divergence, explained_variance, gae, token_rewards, whitened
from trainer.tasks.rollouts.rollout import (
    Experience,
    Floats,
    Ints,
    PromptCompletionBatch,
    Rollout,
    RolloutMicroBatch,
    flat,
)


@dataclass
class PPOMicroBatch(RolloutMicroBatch):
    """The inputs of the losses, each float32 [T], row by row along ``texts.targets``."""

    logps: Floats
    values: Floats
    advantages: Floats
    returns: Floats


class PPOExperience(Experience):
    def __init__(self, rollouts: Sequence[Rollout], section: PPOSection, kl_coef: float) -> None:
        super().__init__(rollouts)
        self._divergences = [divergence(r.logps, r.reference, section.kl_estimator) for r in self.rollouts]
        rewards = [token_rewards(r.score, kl, kl_coef) for r, kl in zip(self.rollouts, self._divergences, strict=True)]
        if section.whiten_rewards:
            rewards = whitened(rewards, centred=False)
        advantages = [
            gae(reward, r.values, section.gamma, section.lam) for reward, r in zip(rewards, self.rollouts, strict=True)
        ]
        self.returns = [a + r.values for a, r in zip(advantages, self.rollouts, strict=True)]
        self.advantages = whitened(advantages, centred=True) if section.whiten_advantages else advantages

    @property
    def kl(self) -> float:
        """Nats per text, by the recipe's estimator."""
        return float(np.mean([kl.sum() for kl in self._divergences]))

    def metrics(self) -> dict[str, float]:
        values, returns = np.concatenate([r.values for r in self.rollouts]), np.concatenate(self.returns)
        explained = explained_variance(values, returns)
        return {**super().metrics(), "kl": self.kl, "value_explained_variance": explained}

    def units(self, part: Ints) -> int:
        return sum(self.rollouts[n].length for n in part)

    def micro_batch(self, part: Ints, index: int) -> PPOMicroBatch:
        some = [self.rollouts[n] for n in part]
        return PPOMicroBatch(
            PromptCompletionBatch.of_rollouts(some, index),
            flat([r.logps for r in some]),
            flat([r.values for r in some]),
            flat([self.advantages[n] for n in part]),
            flat([self.returns[n] for n in part]),
        )
