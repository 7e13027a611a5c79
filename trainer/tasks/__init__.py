"""What is learnt: the loss of a micro-batch, and what an evaluation says."""

from trainer.tasks.base import Measured, Task, make_task
from trainer.tasks.totals import Totals

__all__ = ["Measured", "Task", "Totals", "make_task"]
