"""The settings that tasks share which learn from texts that the model writes itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import AfterValidator, Field

from trainer.recipe.base import MAY_CHANGE, Conflict, Listed, Section
from trainer.recipe.sections.rollouts.reward import RewardSection, function_name

ENVIRONMENT = "environment"
"""The name of the reward of the environment."""


class RolloutTaskSection(Section):
    """Settings of a task that learns from rollouts: texts that the model in training writes, and their rewards."""

    reward: RewardSection = RewardSection()

    environment: Annotated[str, AfterValidator(function_name)] | None = Field(
        default=None, examples=["trainer.tasks.environments.calculator:Calculator"]
    )
    """`package.module:NAME` or `path.py:NAME`, a class whose objects answer the turns of a text: a tool's result, the
    next question. It is the recipe's own code, which runs in processes of its own. null: a text has one turn."""

    environment_weight: float = 1.0
    """Factor of the environment's rewards in the sum of the rewards."""

    environment_timeout_s: Annotated[float, MAY_CHANGE] = Field(default=60.0, gt=0.0)
    """Seconds in which a process of the environment has to answer one turn of all its texts. After that the run
    fails."""

    environment_processes: Annotated[int, MAY_CHANGE] = Field(default=1, ge=1)
    """Processes per rank in which the objects of the environment live. Each has its share of the texts."""

    max_turns: int = Field(default=4, ge=1)
    """Most turns that the model writes in a text; with `environment` only."""

    max_text_tokens: int | None = Field(default=None, ge=1)
    """Most tokens of all turns of a text and the environment's answers between them; with `environment` only. A text
    ends where the next answer and `max_new_tokens` have no room. null: `max_turns` times `max_new_tokens`."""

    max_new_tokens: int = Field(default=128, ge=1)
    """Maximum tokens of a text; with `environment`, of each of its turns. Together with the prompt they must fit the
    model's positions."""

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

    @property
    def answers(self) -> int:
        """The texts that a step writes for each prompt."""
        return 1

    @property
    def longest(self) -> int:
        """The most tokens that may follow a prompt."""
        if self.environment is None:
            return self.max_new_tokens
        return self.max_text_tokens or self.max_turns * self.max_new_tokens

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each reward by its name."""
        weights = self.reward.weights
        return weights if self.environment is None else {**weights, ENVIRONMENT: self.environment_weight}

    def conflicts(self) -> Iterator[Conflict]:
        yield from (conflict.under("reward") for conflict in self.reward.conflicts())
        if self.environment is None:
            for name in (name for name in self.given() if name in OF_ENVIRONMENT):
                yield Conflict(((name,), ("environment",)), "has no effect without environment; leave it out")
            return
        if ENVIRONMENT in self.reward.weights:
            message = f"has a reward of the name {ENVIRONMENT!r}, which is that of the environment; give it another:"
            yield Conflict((("reward",), ("environment",)), message)
        if self.longest < self.max_new_tokens:
            message = f"{self.longest} has no room for one turn of {self.max_new_tokens}; raise it"
            yield Conflict((("max_text_tokens",), ("max_new_tokens",)), message)


OF_ENVIRONMENT = (
    "environment_weight",
    "environment_timeout_s",
    "environment_processes",
    "max_turns",
    "max_text_tokens",
)
