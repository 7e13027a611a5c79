"""The settings that tasks share which learn from texts that the model writes itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from trainer.recipe.base import Conflict, Listed, Section
from trainer.recipe.sections.rollouts.reward import RewardSection


class RolloutTaskSection(Section):
    """Settings of a task that learns from rollouts: texts that the model in training writes, and their rewards."""

    reward: RewardSection = RewardSection()

    max_new_tokens: int = Field(default=128, ge=1)
    """Maximum tokens of a text. Together with the prompt they must fit the model's positions."""

    temperature: float = Field(default=1.0, gt=0.0)
    """Logits are divided by it, for the sampling of texts and for their probabilities."""

    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Tokens are drawn from the smallest set whose probabilities add up to this (arXiv:1904.09751). Below 1 the texts
    are drawn from another distribution than the one that the loss assumes; 1 is recommended."""

    stop: Listed[Annotated[str, Field(min_length=1)]] = ()
    """Strings that also end a text; its reward does not see them."""

    missing_eos_penalty: float = Field(default=0.0, ge=0.0)
    """Subtracted from the reward of a text that ended neither by itself nor with a `stop` string."""

    epochs: int = Field(default=1, ge=1)
    """Passes over a step's texts."""

    minibatches: int = Field(default=1, ge=1)
    """Optimizer updates per epoch, each on a random part of the step's texts, over all ranks."""

    entropy_coef: float = Field(default=0.0, ge=0.0)
    """Weight of the entropy per token (nats), which is subtracted from the loss."""

    def conflicts(self) -> Iterator[Conflict]:
        yield from (conflict.under("reward") for conflict in self.reward.conflicts())
