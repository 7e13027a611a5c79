"""The optimizers, with how each one keeps its state, and the schedules of the learning rate."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.registry import Choice, Registry


@dataclass(frozen=True)
class OptimizerRow(Choice):
    """An optimizer's row.

    ``quantised``: its state is quantised block by block to 8 bits, and cannot be sharded. ``paged``: the driver moves
    its state from the GPU to the host when the GPU is full."""

    quantised: bool = False
    paged: bool = False


OPTIMIZERS = Registry(
    "optimizer",
    {
        "adamw": OptimizerRow("trainer.optim.optimizers:adamw"),
        "adamw_8bit": OptimizerRow("trainer.optim.optimizers:adamw_8bit", quantised=True),
        "paged_adamw_8bit": OptimizerRow("trainer.optim.optimizers:paged_adamw_8bit", quantised=True, paged=True),
    },
)


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
