"""Learning-rate schedules: pure functions of the step, so that a run resumes without any state of the schedule.

With p the progress after the warm-up, from 0 at its end to 1 at the end of the run:

    linear        1 - p
    cosine        (1 + cos(pi p)) / 2; with c cycles, p is the fraction of c p (SGDR, arXiv:1608.03983)
    polynomial    (1 - p)^power
    wsd           1, then a fall over the last steps (warm-up, stable, decay; arXiv:2404.06395)
    inverse_sqrt  sqrt(w / (w + t)), t steps after a warm-up of w (arXiv:1706.03762)

A fall ends at ``min_lr_ratio``: it is scaled to the range from 1 to that.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from trainer.recipe.optimizers import SCHEDULES
from trainer.recipe.sections.schedule import ScheduleSection

TIMESCALE = 10_000
"""The steps in place of the warm-up, in a run without one, of `inverse_sqrt`."""


class ScheduleStep(NamedTuple):
    """A step of a run: ``after`` steps after the warm-up, from 0, of ``warmup`` and ``total`` steps."""

    after: int
    warmup: int
    total: int

    @property
    def progress(self) -> float:
        return min(1.0, self.after / max(1, self.total - self.warmup))


def constant(place: ScheduleStep, section: ScheduleSection) -> float:
    return 1.0


def linear(place: ScheduleStep, section: ScheduleSection) -> float:
    return 1.0 - place.progress


def cosine(place: ScheduleStep, section: ScheduleSection) -> float:
    if place.progress >= 1.0:  # the end of the last fall is not the beginning of another one
        return 0.0
    return half_cosine(section.cycles * place.progress % 1.0)


def polynomial(place: ScheduleStep, section: ScheduleSection) -> float:
    return math.pow(1.0 - place.progress, section.power)


def wsd(place: ScheduleStep, section: ScheduleSection) -> float:
    """The forms of the fall are compared in arXiv:2405.18392, which calls ``sqrt`` 1-sqrt."""
    after_warmup = place.total - place.warmup
    decay = min(math.ceil(place.total * section.decay_ratio), after_warmup)
    fallen = min(1.0, max(0.0, (place.after - after_warmup + decay) / max(1, decay)))
    if section.decay_shape == "cosine":
        return half_cosine(fallen)
    return 1.0 - (math.sqrt(fallen) if section.decay_shape == "sqrt" else fallen)


def inverse_sqrt(place: ScheduleStep, section: ScheduleSection) -> float:
    scale = place.warmup or TIMESCALE
    return math.sqrt(scale / (scale + place.after))


def half_cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def learning_rate(section: ScheduleSection, peak: float, step: int, total_steps: int) -> float:
    """Returns the rate of optimizer step ``step`` (from 1).

    It rises linearly to ``peak`` over the warm-up, then follows the shape down to ``peak * min_lr_ratio``, which the
    step after the last one would reach."""
    warmup = section.warmup(total_steps)
    if step <= warmup:
        return peak * step / warmup
    floor = section.min_lr_ratio
    factor: float = SCHEDULES.load(section.name)(ScheduleStep(step - warmup - 1, warmup, total_steps), section)
    return peak * (floor + (1.0 - floor) * factor)
