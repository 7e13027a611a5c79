"""The seam of an adapter method: what a method does for a run.

A method is one file and one line in the registry. It turns a frozen base into a model with trainable parameters, says
under which names those are saved, and writes the files that a plain ``peft`` (or ``transformers``) loads unaided.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.recipe import Recipe
from trainer.registry import METHODS

if TYPE_CHECKING:
    import torch

    Read = Callable[[str], torch.Tensor]
    ShapeOf = Callable[[torch.nn.Parameter], tuple[int, ...]]

Rows = Callable[[str, int, int], Iterator["torch.Tensor"]]


class Adapter(ABC):
    """One run's adapter. ``weights_file`` is the file that holds what was trained."""

    weights_file = "adapter_model.safetensors"

    round_trips = True
    """True if `read_parameter` finds every trained parameter in ``weights_file``. Otherwise a checkpoint also holds the
    parameters under their own names."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    @property
    def full(self) -> bool:
        """Whether every parameter of the base is trained."""
        return False

    def check(self, base: torch.nn.Module) -> None:  # noqa: B027 - what trains everything fits every model
        """Raises InputError when the recipe's settings do not fit the model, of which shapes are enough."""

    @abstractmethod
    def attach(self, base: torch.nn.Module, plain: Callable[[], torch.nn.Module] | None = None) -> torch.nn.Module:
        """The model to train. Its initial values depend on the seed and the parameters' names alone, never on the rank.

        ``plain`` loads the base once more, unquantised, on the CPU. Raises InputError when the recipe's settings do not
        fit the model."""

    def loads_by_shard(self, base: torch.nn.Module) -> bool:
        """Whether `attach_without_weights` takes this base, and `initial` then knows the values."""
        return False

    def attach_without_weights(self, base: torch.nn.Module) -> torch.nn.Module:
        """The same with ``base`` on the meta device, where the trained parameters are as well afterwards."""
        raise NotImplementedError(f"{type(self).__name__} needs a base that is loaded whole")

    def init_parameter(self, name: str, shape: torch.Size, start: int, stop: int, rows: Rows) -> torch.Tensor:
        """Elements ``start`` to ``stop`` of the flattened parameter ``name``, as `attach` initialises it on a base
        that has its values. After `attach_without_weights`.

        Every rank calls it, for every parameter that the base does not have, in the same order: ``rows(name, first,
        last)`` gives rows of a weight of the base, a few at a time, and is collective."""
        raise NotImplementedError(f"{type(self).__name__} needs a base that is loaded whole")

    @abstractmethod
    def saved_names(self, model: torch.nn.Module) -> dict[str, str]:
        """Name in the saved file for the name of each trainable parameter of ``model`` that it holds as it is."""

    def saved_shapes(self, model: torch.nn.Module, shape_of: ShapeOf) -> dict[str, tuple[int, ...]]:
        """Every tensor of the saved file with its shape; ``shape_of`` tells that of a parameter that is spread."""
        parameters = dict(model.named_parameters())
        return {saved: shape_of(parameters[name]) for name, saved in self.saved_names(model).items()}

    @abstractmethod
    def save(self, model: torch.nn.Module, weights: Mapping[str, torch.Tensor], folder: Path) -> None:
        """Writes ``weights`` (whole tensors on the CPU, by parameter name) and the configuration into ``folder``."""

    def read_parameter(self, model: torch.nn.Module, name: str, read: Read) -> torch.Tensor:
        """The parameter ``name``, whole, from a saved file that ``read`` gives the tensors of."""
        return read(self.saved_names(model)[name])

    def after_restore(self, model: torch.nn.Module, read: Read) -> None:  # noqa: B027 - most have no more
        """Called when the trained parameters have been loaded, on every rank: puts back what belongs to them in the
        frozen ones."""

    def state(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """What the method keeps from step to step beside parameters and optimizer state."""
        return {}

    def load_state(self, model: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
        assert not state, f"{type(self).__name__} keeps no state"

    def lr_scale(self, name: str) -> float:
        """The learning rate of the parameter ``name`` as a multiple of the recipe's."""
        return 1.0

    def around_update(self, model: torch.nn.Module, step: int, total_steps: int) -> AbstractContextManager[Any]:
        """Surrounds the optimizer's update of step ``step`` (from 1), when the step's gradients are complete and not
        yet clipped, until they are thrown away."""
        return nullcontext()

    def starts_at_zero(self, saved_name: str) -> bool:
        """Whether this tensor is zero until it has been trained: the check for a saved adapter that learnt nothing."""
        return False


def head_modules(base: Any) -> list[str]:
    """The modules of the base that are trained whole, whatever the method: a sequence classifier's head."""
    inner = f"{getattr(base, 'base_model_prefix', '')}."
    trained = [name for name, parameter in base.named_parameters() if parameter.requires_grad]
    paths = [name.split(".")[: 2 if name.startswith(inner) else 1] for name in trained]
    return list(dict.fromkeys(".".join(path) for path in paths))


def make_adapter(recipe: Recipe) -> Adapter:
    adapter: Adapter = METHODS.load(recipe.adapter.kind)(recipe)
    return adapter
