"""The optimizers: how each one keeps its state."""

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
