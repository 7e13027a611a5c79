"""Tasks: the loss of a micro-batch, and the metrics of an evaluation."""

from trainer.tasks.base import GenerationContext, LossOutput, Task, Update, make_task
from trainer.tasks.totals import Totals

__all__ = ["GenerationContext", "LossOutput", "Task", "Totals", "Update", "make_task"]
