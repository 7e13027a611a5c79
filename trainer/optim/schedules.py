"""Learning-rate schedules: pure functions of the step, so that a resumed run needs no state to go on."""

from __future__ import annotations

import math
from collections.abc import Callable

from trainer.recipe.sections.schedule import ScheduleSection


def _constant(progress: float) -> float:
    return 1.0


def _linear(progress: float) -> float:
    return 1.0 - progress


def _cosine(progress: float) -> float:
    """SGDR without restarts (Loshchilov & Hutter 2016, arXiv:1608.03983)."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


SHAPES: dict[str, Callable[[float], float]] = {"constant": _constant, "linear": _linear, "cosine": _cosine}


def learning_rate(section: ScheduleSection, peak: float, step: int, total_steps: int) -> float:
    """The rate for optimizer step ``step`` (from 1): rises linearly to ``peak`` over the warm-up, then follows the
    shape down to ``peak * min_lr_ratio``, which the step after the last one would reach."""
    warmup = section.warmup(total_steps)
    if step <= warmup:
        return peak * step / warmup
    span = max(1, total_steps - warmup)
    progress = min(1.0, (step - warmup - 1) / span)
    floor = section.min_lr_ratio
    return peak * (floor + (1.0 - floor) * SHAPES[section.name](progress))
