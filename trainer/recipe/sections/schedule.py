"""The learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from trainer.recipe.base import Conflict, Section


class ScheduleSection(Section):
    """The learning rate over the steps of the run."""

    name: Literal["constant", "linear", "cosine"] = "constant"
    """Course after the warm-up: stay at `lr`, or fall to `min_lr_ratio` of it by the end of the run, in a line or
    half a cosine."""

    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises in a line from 0 to `lr`."""

    warmup_ratio: float = Field(default=0.0, ge=0.0, lt=1.0)
    """The same as a fraction of the run's steps, rounded up, for runs whose number of steps comes from their epochs.
    One of the two is given."""

    min_lr_ratio: float = Field(default=0.0, ge=0.0, le=1.0)
    """Learning rate that a falling schedule ends at, as a fraction of `lr`."""

    def warmup(self, total_steps: int) -> int:
        """Steps of the warm-up in a run of this many."""
        return self.warmup_steps or math.ceil(total_steps * self.warmup_ratio)

    def conflicts(self) -> Iterator[Conflict]:
        if self.warmup_steps and self.warmup_ratio:
            message = f"{self.warmup_ratio} stands beside warmup_steps {self.warmup_steps}; give one of them"
            yield Conflict((("warmup_ratio",), ("warmup_steps",)), message)
        if self.name == "constant" and self.min_lr_ratio > 0:
            message = "has no effect with schedule.name constant; leave it out, or choose linear or cosine"
            yield Conflict((("min_lr_ratio",), ("name",)), message)
