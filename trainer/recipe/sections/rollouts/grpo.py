"""Reinforcement learning from groups of answers (GRPO and its variants)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from trainer.recipe.base import Conflict, OneOf
from trainer.recipe.sections.rollouts.losses import GRPO_LOSSES, GRPOLossRow
from trainer.recipe.sections.rollouts.task import RolloutTaskSection


class GRPOSection(RolloutTaskSection):
    """Settings of `task: grpo`. A step of the run writes several answers to each of its prompts, compares their
    rewards, and updates the policy."""

    loss: Annotated[str, OneOf(GRPO_LOSSES)] = "dapo"
    """The variant: `grpo`, `dr_grpo`, `dapo`, `gspo`, `cispo` or `rloo`; formulas in [tasks.md](tasks.md#grpo)."""

    group_size: int = Field(default=8, ge=2)
    """Answers per prompt. A step has `training.global_batch` prompts, and this many texts for each."""

    clip_low: float | None = Field(default=None, gt=0.0, le=1.0)
    """A ratio of probabilities is clipped to at least 1 - this; null takes the default of the loss (0.2; `gspo`
    0.0003). `cispo` has no lower limit."""

    clip_high: float | None = Field(default=None, gt=0.0)
    """A ratio of probabilities is clipped to at most 1 + this; null takes the default of the loss (0.2; `dapo` 0.28;
    `gspo` 0.0004; `cispo` 4)."""

    scale_rewards: Literal["group", "batch", "none"] | None = None
    """What advantages are divided by: the standard deviation of the rewards of the group, that of the whole step, or
    nothing; null takes the default of the loss (`group`; `dr_grpo` and `rloo` none)."""

    kl_coef: float = Field(default=0.0, ge=0.0)
    """Cost of a nat of divergence from the reference, the model with its adapter off; 0 needs no reference and saves
    its forward pass. It is added to the loss of each token (k3, times the ratio of probabilities); with `rloo` it is
    taken off the reward (k1)."""

    dynamic_sampling: int = Field(default=0, ge=0)
    """How often the answers of a group are written again, with other random numbers, while all of them have the same
    reward, from which nothing can be learned (DAPO, arXiv:2503.14476, 3.2). Groups without a difference after that are
    left out of the loss. 0 writes every group once and leaves none out."""

    overlong_filter: bool = False
    """Leave texts that did not end within `max_new_tokens`, or with `environment` within its limits, out of the loss
    (arXiv:2503.14476, 3.4)."""

    overlong_buffer: int = Field(default=0, ge=0)
    """The last tokens of `max_new_tokens` (with `environment`, of `max_text_tokens`), in which a text's reward falls by
    up to `overlong_penalty`, in proportion to the model's tokens there (arXiv:2503.14476, equation 13); 0: no such
    penalty."""

    overlong_penalty: float = Field(default=1.0, gt=0.0)
    """Largest penalty for a long text, in units of the reward; with `overlong_buffer` only."""

    eval_answers: int = Field(default=1, ge=1)
    """Answers per prompt in an evaluation, for `eval_pass_at_k`: the share of prompts of which one passes."""

    pass_reward: float = 1.0
    """An answer passes if its reward, without penalties, is at least this."""

    @property
    def answers(self) -> int:
        return self.group_size

    @property
    def row(self) -> GRPOLossRow:
        return GRPO_LOSSES[self.loss]

    @property
    def clip(self) -> tuple[float, float]:
        """The distances of the limits from 1, below and above."""
        low, high = self.row.clip
        return self.clip_low or low, self.clip_high or high

    @property
    def scale(self) -> Literal["group", "batch", "none"]:
        return self.scale_rewards or self.row.scale

    def conflicts(self) -> Iterator[Conflict]:
        yield from super().conflicts()
        if self.overlong_buffer >= self.longest:
            yield Conflict(
                (("overlong_buffer",), ("max_new_tokens",)),
                f"{self.overlong_buffer} is not less than {self.longest}, so that every text has a penalty",
            )
        if not self.overlong_buffer and self.overlong_penalty != type(self).model_fields["overlong_penalty"].default:
            yield Conflict((("overlong_penalty",), ("overlong_buffer",)), "has no effect without overlong_buffer")
        if self.clip_low is not None and self.loss == "cispo":
            yield Conflict((("clip_low",), ("loss",)), "has no effect with cispo, which has no lower limit")
