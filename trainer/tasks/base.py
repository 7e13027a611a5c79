"""The interface of a task."""

from __future__ import annotations

import reprlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from trainer.distributed.world import World
from trainer.errors import InputError
from trainer.parsing import Malformed
from trainer.recipe.tasks import TASKS
from trainer.tasks.inputs import model_inputs

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedTokenizerBase

    from trainer.data import Batch, StepPlan
    from trainer.model.kernels.context import Context
    from trainer.recipe import Recipe
    from trainer.run.events import SampleText
    from trainer.tasks.rollouts.dialogue import Dialogue


class LossOutput(NamedTuple):
    """The result of `Task.loss`. ``loss_sum``: the loss summed over the units of a micro-batch, a float32 scalar on the
    device with a gradient. ``sums``: scalars or vectors without a gradient, from which metrics are computed. Every
    micro-batch, also one without units, has the same names and shapes, since they are added up over all ranks."""

    loss_sum: torch.Tensor
    sums: Mapping[str, torch.Tensor]


class LossInput(Protocol):
    """The input of `Task.loss`, as the loop sees it. ``index``: its number in the update, -1 for an input of weight
    zero. ``sample_ids``: reported when its loss is not finite."""

    @property
    def index(self) -> int: ...
    @property
    def sample_ids(self) -> list[str]: ...


class Update(NamedTuple):
    """One update of the optimizer. ``batches``: this rank's micro-batches, the same number on every rank. ``units``:
    the number of units, over all ranks, that the loss is the mean over."""

    batches: Sequence[LossInput]
    units: int


@dataclass(frozen=True)
class GenerationContext:
    """Everything except the model that a task needs to generate texts. ``world``: the ranks that generate together,
    None for one process. ``forward_is_collective``: the strategy gathers parameters in a forward pass, so that every
    rank must run the same number of them. ``reward``: the reward model (`trainer.tasks.rewards.models`), if the
    recipe names one. ``dialogue``: the form of an environment's answers, if the recipe names one."""

    tokenizer: PreTrainedTokenizerBase
    world: World | None = None
    forward_is_collective: bool = False
    reward: Any = None
    dialogue: Dialogue | None = None


class Task(ABC):
    """The interface between the loop and a task. Most tasks know neither ranks nor strategies; one that generates texts
    has a `GenerationContext`."""

    labels: tuple[str, ...] | None = None
    """Names of the outputs of a sequence classifier's head; None if the model is a causal language model."""

    prepares_steps = False
    """True if the loop must call `prepare_step` before the losses of a step."""

    world: World | None = None
    """The ranks of the attempt, for a task that exchanges numbers in `prepare_step`; None in a process of its own."""

    generates = False
    """True if the task generates texts; `attach` then gets a `GenerationContext`."""

    head: Any = None
    """The `trainer.tasks.lm_head_loss.TargetHead` of a language model, whose logits generate texts; set by `attach`."""

    teacher: Any = None
    """The `trainer.tasks.distill.teacher.Teacher` of a task that learns from one; set before `attach`."""

    outputs_from_model = True
    """True if `outputs` are those of the model that is trained, as it is before the first step; False if they do not
    depend on it."""

    extra_module: str | None = None
    """Name of a module that the task adds to the model. It is trained with the adapter and saved in a file of its own,
    ``<extra_module>.safetensors``, under the names of its parameters."""

    def __init__(self, recipe: Recipe, labels: tuple[str, ...] = ()) -> None:
        """``labels``: the label set of the training data."""
        self.recipe = recipe

    def attach(  # noqa: B027 - some tasks do not change the model
        self, model: torch.nn.Module, generation: GenerationContext | None = None
    ) -> None:
        """Prepares the (unwrapped) model for this task's loss. ``generation``: given if the task `generates`."""

    def inputs(self, input_ids: np.ndarray, position_ids: np.ndarray, device: torch.device) -> dict[str, Any]:
        """Returns the arguments with which `loss` calls a causal language model, from arrays [B, L]. The checks of the
        model before the first step use them."""
        return (self.head.inputs if self.head else model_inputs)(input_ids, position_ids, device)

    def compute_together(self, context: Context) -> None:
        """Prepares the losses for ranks that each compute a part of the tokens. Raises InputError if the task
        cannot."""
        if self.head is None:
            raise InputError(f"strategy.context_parallel {context.size}: task {self.recipe.task} cannot divide a text")
        self.head.context = context

    def owns_parameter(self, name: str) -> bool:
        """Returns True for a parameter that the task has added to the model."""
        return False

    def init_parameter(self, name: str, shape: torch.Size) -> torch.Tensor:
        """Returns the initial values of a parameter that the task owns, the same on every rank."""
        raise NotImplementedError(f"{type(self).__name__} has no parameters of its own")

    def prepare_step(  # noqa: B027
        self, module: torch.nn.Module, batches: Sequence[Batch], device: torch.device, step: int = 0
    ) -> None:
        """Computes what the losses of a step need (reference log-probabilities, rollouts), if `prepares_steps` is set.

        Every rank calls it once per step, with as many micro-batches as every other rank, in evaluation mode and
        without gradients; in an evaluation once per batch, as step 0. The task keeps the result for `loss`."""

    @property
    def steps_ahead(self) -> int:
        """The number of later steps that `prepare_ahead` gets during a step."""
        return 0

    def prepare_ahead(  # noqa: B027
        self, module: torch.nn.Module, batches: Sequence[Batch], device: torch.device, step: int
    ) -> None:
        """Begins what a later step needs, between `prepare_step` and the losses of a step. Called as `prepare_step`
        is, in the order of the steps, and several times for a step."""

    def close(self) -> None:  # noqa: B027
        """Ends what the task has started on this rank. Called once, also after a failure."""

    def output_settings(self) -> dict[str, Any] | None:
        """Returns everything besides the data that decides `outputs`, and besides the model where they are those of the
        model; None if the task stores none."""
        return None

    def bytes_of_target(self) -> int:
        """Returns the bytes of the `outputs` for each target; 0 for outputs that are smaller than the samples."""
        return 0

    def outputs(self, module: torch.nn.Module, batch: Batch, device: torch.device) -> Mapping[str, Any]:
        """Returns the outputs for the samples of a micro-batch: by name, an array for each sample. They are computed
        once, without gradients, and come back in `Batch.outputs`."""
        raise NotImplementedError(f"{type(self).__name__} stores no outputs")

    def outputs_are_stored(self) -> None:  # noqa: B027 - for tasks whose outputs need more than the model
        """Releases what computed the `outputs`. The attempt calls it once, when those of all samples are stored."""

    def updates(self, step: int, plan: StepPlan, batches: Sequence[Batch]) -> Iterator[Update]:
        """Yields the step's updates, after `prepare_step`. Every rank has as many ``batches`` and updates."""
        yield Update(batches, self.loss_units(plan))

    @abstractmethod
    def loss(self, module: torch.nn.Module, batch: Any, device: torch.device) -> LossOutput:
        """Returns the loss of a micro-batch. It is zero for one without units, and still connected to every trained
        parameter, since every rank runs the same number of backward passes."""

    def eval_loss(self, module: torch.nn.Module, batch: Batch, device: torch.device) -> LossOutput:
        """Returns the loss of an evaluation's batch."""
        if self.prepares_steps:
            self.prepare_step(module, [batch], device)
        return self.loss(module, batch, device)

    def dummy_batch(self, batch: Batch) -> Any:
        """Returns an input for `loss` when no step was prepared; `muster plan` measures memory with it."""
        return batch

    def loss_units(self, of: StepPlan | Batch) -> int:
        """Returns the number of units that the loss is the mean over: target tokens by default."""
        return of.target_tokens

    @abstractmethod
    def metrics(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Returns an evaluation's metrics, its ``loss`` among them. ``sums``: the sums of `loss` over all ranks, with
        ``loss`` and ``units``; float64 tensors on the CPU."""

    def step_metrics(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Returns a training step's metrics besides the loss, from the sums of all its updates."""
        return {}

    def example_rollouts(self) -> list[SampleText]:
        """Returns texts to show a person after a step; the same on every rank."""
        return []

    def models(self) -> dict[str, Any]:
        """Returns what identifies each further model that the task uses, by its role, as JSON."""
        return {}

    def state(self) -> dict[str, Any]:
        """Returns the state that the task keeps between steps besides parameters, as JSON for the commit record."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Raises Malformed for a value that `state` cannot have returned."""
        if state:
            raise Malformed(f"{type(self).__name__} keeps no state, and there is {reprlib.repr(state)}")


def make_task(recipe: Recipe, labels: tuple[str, ...] = ()) -> Task:
    task: Task = TASKS.load(recipe.task)(recipe, labels)
    return task


def ratio(sums: Mapping[str, torch.Tensor], name: str) -> float:
    """Returns the mean of a sum over its units; 0 if there are none."""
    return float(sums[name]) / max(1.0, float(sums["units"]))
