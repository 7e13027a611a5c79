"""The seam of a task."""

from __future__ import annotations

import reprlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from trainer.distributed.world import World
from trainer.parsing import Malformed
from trainer.registry import TASKS

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from trainer.data import Batch, StepPlan
    from trainer.recipe import Recipe


class Measured(NamedTuple):
    """``loss_sum``: the loss summed over the units of a micro-batch, a float32 scalar on the device with a gradient.
    ``sums``: what the metrics are made of, each a scalar or a vector without one; the same names and shapes for every
    micro-batch, one without units included, since they are added up over all ranks."""

    loss_sum: torch.Tensor
    sums: Mapping[str, torch.Tensor]


class MicroBatch(Protocol):
    """What the loop has to know of what `Task.measure` takes: its number among the update's, -1 for one of weight zero,
    and what it names when its loss is not finite."""

    @property
    def index(self) -> int: ...
    @property
    def sample_ids(self) -> list[str]: ...


class Update(NamedTuple):
    """One update of the optimizer. ``batches``: this rank's micro-batches, as many as every other rank has; ``units``:
    what the loss is the mean over, of all ranks."""

    batches: Sequence[MicroBatch]
    units: int


@dataclass(frozen=True)
class Company:
    """What a task that writes texts has beside the model. ``world``: the ranks that do so together, None for whoever is
    alone. ``meets``: whether the strategy gathers parameters in a forward, so that every rank has to run as many.
    ``reward``: the model that rates texts (`trainer.tasks.ppo.reward_models`), where the recipe names one."""

    tokenizer: PreTrainedTokenizerBase
    world: World | None = None
    meets: bool = False
    reward: Any = None


class Task(ABC):
    """What the loop asks of a task. Most know neither ranks nor strategies; one that writes texts has its `Company`."""

    labels: tuple[str, ...] | None = None
    """Names of the outputs of a sequence classifier's head; None where the model is a causal language model."""

    prepares = False
    """Whether there is a phase before the losses of a step: see `prepare`."""

    writes = False
    """Whether it writes texts, for which it is given its `company` before it is attached."""

    company: Company

    head: Any = None
    """Of a language model, once it is attached: the `trainer.tasks.lm_head_loss.TargetHead` by whose logits it can
    write."""

    beside: str | None = None
    """A module that the task puts on the model, trained with the adapter and saved beside it, as `<beside>.safetensors`
    under the names of its parameters."""

    def __init__(self, recipe: Recipe, labels: tuple[str, ...] = ()) -> None:
        """``labels``: the label set of the training data."""
        self.recipe = recipe

    def attach(self, model: torch.nn.Module) -> None:  # noqa: B027 - some tasks take the model as it is
        """Prepares the (unwrapped) model for this task's loss."""

    def owns(self, name: str) -> bool:
        """Whether the task itself has put this parameter on the model."""
        return False

    def initial(self, name: str, shape: torch.Size) -> torch.Tensor:
        """The first values of a parameter that it owns, the same on every rank."""
        raise NotImplementedError(f"{type(self).__name__} has no parameters of its own")

    def prepare(  # noqa: B027
        self, module: torch.nn.Module, batches: Sequence[Batch], device: torch.device, step: int = 0
    ) -> None:
        """The phase before the losses of a step, where ``prepares`` says that there is one: every rank runs it once per
        step with the micro-batches that it is about to learn from (of an evaluation: with each batch by itself, as step
        0), in evaluation mode and without gradients. Ranks have the same number of them. What it finds it keeps for
        `measure`."""

    def updates(self, step: int, plan: StepPlan, batches: Sequence[Batch]) -> Iterator[Update]:
        """The step's updates, after `prepare`, one after the other. Ranks have the same number of ``batches`` and of
        updates."""
        yield Update(batches, self.units(plan))

    @abstractmethod
    def measure(self, module: torch.nn.Module, batch: Any, device: torch.device) -> Measured:
        """The loss of a micro-batch. For one without units: zero, still connected to every trained parameter."""

    def evaluated(self, module: torch.nn.Module, batch: Batch, device: torch.device) -> Measured:
        """The same for an evaluation."""
        if self.prepares:
            self.prepare(module, [batch], device)
        return self.measure(module, batch, device)

    def rehearsed(self, batch: Batch) -> Any:
        """What `measure` takes where no step was prepared, for a plan of memory."""
        return batch

    def units(self, of: StepPlan | Batch) -> int:
        """What the loss is the mean over: target tokens, unless a task says otherwise."""
        return of.target_tokens

    @abstractmethod
    def metrics(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """What an evaluation says, from the sums of `measure` over all ranks, with ``loss`` and ``units`` among them;
        float64 tensors on the CPU."""

    def step_metrics(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """What a training step says beside its loss; the sums are those of all its updates."""
        return {}

    def examples(self) -> list[dict[str, Any]]:
        """What there is to look at after a step; the same on every rank."""
        return []

    def state(self) -> dict[str, Any]:
        """What the task keeps from step to step beside parameters, as JSON: it lies in the commit record."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Raises Malformed for what `state` cannot have given."""
        if state:
            raise Malformed(f"{type(self).__name__} keeps no state, and there is {reprlib.repr(state)}")


def make_task(recipe: Recipe, labels: tuple[str, ...] = ()) -> Task:
    task: Task = TASKS.load(recipe.task)(recipe, labels)
    return task


def ratio(sums: Mapping[str, torch.Tensor], name: str) -> float:
    """The mean of a sum over its units; 0 without any."""
    return float(sums[name]) / max(1.0, float(sums["units"]))
