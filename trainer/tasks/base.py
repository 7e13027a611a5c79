"""The seam of a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from trainer.registry import TASKS

if TYPE_CHECKING:
    import torch

    from trainer.data import Batch
    from trainer.recipe import Recipe


class Task(ABC):
    """What the loop asks of a task. It knows neither ranks nor strategies."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    @abstractmethod
    def attach(self, model: torch.nn.Module) -> None:
        """Prepares the (unwrapped) model for this task's loss."""

    @abstractmethod
    def loss_sum(self, module: torch.nn.Module, batch: Batch, device: torch.device) -> torch.Tensor:
        """The loss summed over the micro-batch's ``target_tokens``, a float32 scalar on ``device`` with a gradient. For
        a micro-batch without targets: zero, still connected to every trained parameter."""

    @abstractmethod
    def eval_metrics(self, loss_sum: float, targets: int) -> dict[str, float]:
        """What an evaluation reports, from sums over all ranks."""


def make_task(recipe: Recipe) -> Task:
    task: Task = TASKS.load(recipe.task)(recipe)
    return task
