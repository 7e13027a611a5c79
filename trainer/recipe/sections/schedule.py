"""The learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from trainer.recipe.base import Conflict, OneOf, Section
from trainer.recipe.optimizers import SCHEDULES


class ScheduleSection(Section):
    """The learning rate over the steps of the run."""

    name: Annotated[str, OneOf(SCHEDULES)] = "constant"
    """Learning rate after the warm-up: constant at `lr`, or a fall to `min_lr_ratio` of it by the end of the run,
    linear or as half a cosine."""

    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises linearly from 0 to `lr`."""

    warmup_ratio: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Warm-up as a fraction of the run's steps, rounded up, for runs whose number of steps follows from their epochs.
    Only one of `warmup_steps` and `warmup_ratio` may be given."""

    min_lr_ratio: float = Field(default=0.0, ge=0.0, le=1.0)
    """Final learning rate of a falling schedule, as a fraction of `lr`."""

    def warmup(self, total_steps: int) -> int:
        """Returns the warm-up steps of a run of ``total_steps``."""
        return self.warmup_steps or math.ceil(total_steps * self.warmup_ratio)

    def conflicts(self) -> Iterator[Conflict]:
        if self.warmup_steps and self.warmup_ratio:
            message = f"{self.warmup_ratio} is given with warmup_steps {self.warmup_steps}; give one of them"
            yield Conflict((("warmup_ratio",), ("warmup_steps",)), message)
        if not SCHEDULES[self.name].falls and self.min_lr_ratio > 0:
            falling = " or ".join(name for name, row in SCHEDULES.items() if row.falls)
            message = f"has no effect with schedule.name {self.name}; leave it out, or choose {falling}"
            yield Conflict((("min_lr_ratio",), ("name",)), message)
