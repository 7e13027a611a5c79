"""The engine that writes texts in training: the model itself, or servers beside it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from trainer.recipe.base import OneOf, Section
from trainer.recipe.rollout_engines import ROLLOUT_ENGINES, RolloutEngineRow


class RolloutSection(Section):
    """How the texts of the tasks `ppo` and `grpo` are written. See [rollouts.md](rollouts.md)."""

    engine: Annotated[str, OneOf(ROLLOUT_ENGINES)] = "transformers"
    """`transformers`: the model in training writes them, the same texts on any number of workers. `vllm`: servers of
    vLLM, which muster starts or which are given by their addresses; they get the adapter before each step."""

    max_staleness: int = Field(default=0, ge=0)
    """How many updates older than the policy the weights may be that write a text. 0 waits for each step's texts; 1
    writes those of the next step while the policy learns from this one's. For servers only."""

    importance_cap: float | None = Field(default=2.0, gt=0.0)
    """Largest weight of a token by the ratio of its probabilities in training and by the server, which differ
    (truncated importance sampling); null gives every token the weight 1. For servers only."""

    @property
    def row(self) -> RolloutEngineRow:
        return ROLLOUT_ENGINES[self.engine]
