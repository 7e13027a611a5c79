"""What is learnt: the loss of a micro-batch, and what an evaluation says."""

from trainer.tasks.base import Task, make_task

__all__ = ["Task", "make_task"]
