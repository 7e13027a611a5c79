"""The seam of a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from trainer.registry import TASKS

if TYPE_CHECKING:
    import torch

    from trainer.data import Batch, StepPlan
    from trainer.recipe import Recipe


class Measured(NamedTuple):
    """``loss_sum``: the loss summed over the units of a micro-batch, a float32 scalar on the device with a gradient.
    ``sums``: what the metrics are made of, each a scalar or a vector without one; the same names and shapes for every
    micro-batch, one without units included, since they are added up over all ranks."""

    loss_sum: torch.Tensor
    sums: Mapping[str, torch.Tensor]


class Task(ABC):
    """What the loop asks of a task. It knows neither ranks nor strategies."""

    labels: tuple[str, ...] | None = None
    """Names of the outputs of a sequence classifier's head; None where the model is a causal language model."""

    prepares = False
    """Whether there is a phase before the losses of a step: see `prepare`."""

    def __init__(self, recipe: Recipe, labels: tuple[str, ...] = ()) -> None:
        """``labels``: the label set of the training data."""
        self.recipe = recipe

    def attach(self, model: torch.nn.Module) -> None:  # noqa: B027 - some tasks take the model as it is
        """Prepares the (unwrapped) model for this task's loss."""

    def prepare(self, module: torch.nn.Module, batches: Sequence[Batch], device: torch.device) -> None:  # noqa: B027
        """The phase before the losses of a step, where ``prepares`` says that there is one: every rank runs it once per
        step with the micro-batches that it is about to learn from (of an evaluation: with each batch by itself), in
        evaluation mode and without gradients. Ranks have the same number of them. What it finds it keeps for
        `measure`."""

    @abstractmethod
    def measure(self, module: torch.nn.Module, batch: Batch, device: torch.device) -> Measured:
        """The loss of a micro-batch. For one without units: zero, still connected to every trained parameter."""

    def units(self, of: StepPlan | Batch) -> int:
        """What the loss is the mean over: target tokens, unless a task says otherwise."""
        return of.target_tokens

    @abstractmethod
    def metrics(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """What an evaluation says, from the sums of `measure` over all ranks, with ``loss`` and ``units`` among them;
        float64 tensors on the CPU."""

    def step_metrics(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """What a training step says beside its loss."""
        return {}


def make_task(recipe: Recipe, labels: tuple[str, ...] = ()) -> Task:
    task: Task = TASKS.load(recipe.task)(recipe, labels)
    return task


def ratio(sums: Mapping[str, torch.Tensor], name: str) -> float:
    """The mean of a sum over its units; 0 without any."""
    return float(sums[name]) / max(1.0, float(sums["units"]))
