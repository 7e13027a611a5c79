"""Reinforcement learning with PPO: the limits on the policy's change, and the critic."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from trainer.recipe.base import Conflict
from trainer.recipe.sections.rollouts.task import RolloutTaskSection


class PPOSection(RolloutTaskSection):
    """Settings of `task: ppo`. A step of the run is an iteration: texts for its prompts, rewards, and updates."""

    kl_coef: float = Field(default=0.05, ge=0.0)
    """Cost of a nat of divergence from the reference (the model with its adapter off), in units of the reward; with
    `kl_target`, the initial cost. trl has 0.05, Ziegler et al. 0.15."""

    kl_target: float | None = Field(default=None, gt=0.0)
    """Divergence in nats per text to which the coefficient is adapted (Ziegler et al. 2019, arXiv:1909.08593, 2.2);
    null keeps the coefficient fixed."""

    kl_horizon: int = Field(default=10_000, ge=1)
    """Texts over which the coefficient may grow by a fifth; with `kl_target` only. 10,000 is Ziegler et al.'s."""

    kl_estimator: Literal["k1", "k3"] = "k1"
    """How a token's divergence is estimated: `k1` is log p - log p_reference; `k3` has the same mean with less variance
    and is never negative (Schulman 2020, *Approximating KL divergence*)."""

    gamma: float = Field(default=1.0, gt=0.0, le=1.0)
    """Discount per token. 1 is usual for texts."""

    lam: float = Field(default=0.95, ge=0.0, le=1.0)
    """λ of generalised advantage estimation (arXiv:1506.02438): 0 trusts the value head alone, 1 the rewards alone."""

    epochs: int = Field(default=4, ge=1)
    """Passes over an iteration's texts."""

    clip_range: float = Field(default=0.2, gt=0.0)
    """ε of the policy's loss (arXiv:1707.06347, equation 7): a token's probability ratio is clipped to 1 ± ε."""

    value_clip_range: float | None = Field(default=0.2, gt=0.0)
    """Largest change of a value from its initial value that the loss follows; null never clips."""

    value_coef: float = Field(default=0.1, gt=0.0)
    """Weight of the value head's loss relative to the policy's. trl has 0.1."""

    whiten_rewards: bool = False
    """Divide the tokens' rewards by their standard deviation over the iteration; the mean is not subtracted."""

    whiten_advantages: bool = True
    """Normalise advantages to mean 0 and standard deviation 1 over all tokens of the iteration, on all ranks."""

    def conflicts(self) -> Iterator[Conflict]:
        yield from super().conflicts()
        if self.kl_target is not None and self.kl_coef == 0.0:
            yield Conflict((("kl_coef",), ("kl_target",)), "0 cannot be adapted, only multiplied; set it above 0")
        if self.kl_target is None and self.kl_horizon != type(self).model_fields["kl_horizon"].default:
            yield Conflict((("kl_horizon",), ("kl_target",)), "has no effect without kl_target; leave it out")
