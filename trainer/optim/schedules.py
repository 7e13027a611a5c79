"""Learning-rate schedules: pure functions of the step, so that a run resumes without any state of the schedule."""

from __future__ import annotations

import math

from trainer.recipe.optimizers import SCHEDULES
from trainer.recipe.sections.schedule import ScheduleSection


def constant(progress: float) -> float:
    return 1.0


def linear(progress: float) -> float:
    return 1.0 - progress


def cosine(progress: float) -> float:
    """SGDR without restarts (Loshchilov & Hutter 2016, arXiv:1608.03983)."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def learning_rate(section: ScheduleSection, peak: float, step: int, total_steps: int) -> float:
    """Returns the rate of optimizer step ``step`` (from 1).

    It rises linearly to ``peak`` over the warm-up, then follows the shape down to ``peak * min_lr_ratio``, which the
    step after the last one would reach."""
    warmup = section.warmup(total_steps)
    if step <= warmup:
        return peak * step / warmup
    span = max(1, total_steps - warmup)
    progress = min(1.0, (step - warmup - 1) / span)
    floor = section.min_lr_ratio
    factor: float = SCHEDULES.load(section.name)(progress)
    return peak * (floor + (1.0 - floor) * factor)
