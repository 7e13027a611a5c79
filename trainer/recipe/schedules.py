"""The learning-rate schedules."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.registry import Choice, Registry


@dataclass(frozen=True)
class ScheduleRow(Choice):
    """A schedule's row. Its code is a function: the factor of the learning rate, from 1 to 0, by the progress of the
    steps after the warm-up, from 0 to 1. ``falls``: the factor falls, so that `min_lr_ratio` has an effect."""

    falls: bool = True


SCHEDULES = Registry(
    "schedule",
    {
        "constant": ScheduleRow("trainer.optim.schedules:constant", falls=False),
        "linear": ScheduleRow("trainer.optim.schedules:linear"),
        "cosine": ScheduleRow("trainer.optim.schedules:cosine"),
    },
)
