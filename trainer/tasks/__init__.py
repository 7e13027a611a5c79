"""Tasks: the loss of a micro-batch, and the metrics of an evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.tasks.base import GenerationContext, LossOutput, Task, Update, make_task
    from trainer.tasks.totals import Totals

__all__ = ["GenerationContext", "LossOutput", "Task", "Totals", "Update", "make_task"]


def __getattr__(name: str) -> Any:
    # On first use: the processes of reward functions import a module of this package, and need no torch.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from trainer.tasks import base, totals

    return getattr(totals if name == "Totals" else base, name)
