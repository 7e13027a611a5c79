"""The learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from trainer.recipe.base import Conflict, OneOf, Section
from trainer.recipe.optimizers import SCHEDULES

SETTINGS = tuple(dict.fromkeys(setting for _, row in SCHEDULES.items() for setting in row.settings))
"""The fields that have an effect on some schedules only."""


class ScheduleSection(Section):
    """The learning rate over the steps of the run."""

    name: Annotated[str, OneOf(SCHEDULES)] = "constant"
    """Learning rate after the warm-up: `constant` at `lr`; `linear`, `cosine` (half a cosine) or `polynomial`, a fall
    to `min_lr_ratio` of it by the end of the run; `wsd`, constant and then a fall over the last `decay_ratio` of the
    run; `inverse_sqrt`, a fall with the square root of the step, whatever the length of the run."""

    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises linearly from 0 to `lr`."""

    warmup_ratio: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Warm-up as a fraction of the run's steps, rounded up, for runs whose number of steps follows from their epochs.
    Only one of `warmup_steps` and `warmup_ratio` may be given."""

    min_lr_ratio: float = Field(default=0.0, ge=0.0, le=1.0)
    """Final learning rate of a falling schedule, as a fraction of `lr`."""

    cycles: int = Field(default=1, ge=1)
    """Falls of `cosine` after the warm-up, all of the same length, each starting at `lr`."""

    decay_ratio: float = Field(default=0.1, gt=0.0, le=1.0)
    """Fraction of the run's steps, rounded up, over which `wsd` falls."""

    decay_shape: Literal["linear", "cosine", "sqrt"] = "linear"
    """Form of the fall of `wsd`: a line, half a cosine, or 1 minus the square root."""

    power: float = Field(default=1.0, gt=0.0)
    """Exponent of `polynomial`; 1 is a line."""

    def warmup(self, total_steps: int) -> int:
        """Returns the warm-up steps of a run of ``total_steps``."""
        return self.warmup_steps or math.ceil(total_steps * self.warmup_ratio)

    def conflicts(self) -> Iterator[Conflict]:
        if self.warmup_steps and self.warmup_ratio:
            message = f"{self.warmup_ratio} is given with warmup_steps {self.warmup_steps}; give one of them"
            yield Conflict((("warmup_ratio",), ("warmup_steps",)), message)
        for setting in SETTINGS:
            if setting in self.given() and setting not in SCHEDULES[self.name].settings:
                users = " or ".join(name for name, row in SCHEDULES.items() if setting in row.settings)
                message = f"has no effect with schedule.name {self.name}; leave it out, or choose {users}"
                yield Conflict(((setting,), ("name",)), message)
