"""The interface of an adapter method.

A method is one file and one line in the registry. It turns a frozen base model into a model with trainable parameters,
defines the names under which they are saved, and writes files that plain ``peft`` (or ``transformers``) can load.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.recipe import Recipe
from trainer.recipe.methods import METHODS

if TYPE_CHECKING:
    import torch

    Read = Callable[[str], torch.Tensor]
    ShapeOf = Callable[[torch.nn.Parameter], tuple[int, ...]]

Rows = Callable[[str, int, int], Iterator["torch.Tensor"]]


class Adapter(ABC):
    """The adapter of one run. ``weights_file``: the file that contains the trained parameters."""

    weights_file = "adapter_model.safetensors"

    round_trips = True
    """True if `read_parameter` finds every trained parameter in ``weights_file``. Otherwise a checkpoint also holds the
    parameters under their own names."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    @property
    def full(self) -> bool:
        """True if every parameter of the base model is trained."""
        return False

    left_out: frozenset[str] = frozenset()
    """Full names of layers that get no adapter although the targets include them; set before `attach`."""

    def may_leave_out(self, model: torch.nn.Module, unused: Sequence[str]) -> list[str]:
        """Returns the full names of the layers whose adapters are the parameters ``unused`` of the attached ``model``.
        Empty if one of these is no part of an adapter, or if the recipe names its layer."""
        return []

    def check(self, base: torch.nn.Module) -> None:  # noqa: B027 - full fine-tuning fits every model
        """Raises InputError when the recipe's settings do not fit the model. Only its shapes are read."""

    @abstractmethod
    def attach(self, base: torch.nn.Module, plain: Callable[[], torch.nn.Module] | None = None) -> torch.nn.Module:
        """Returns the model to train. Its initial values depend on the seed and the parameters' names only, never on
        the rank.

        ``plain`` loads the base model again, unquantised, on the CPU. Raises InputError when the recipe's settings do
        not fit the model."""

    def loads_by_shard(self, base: torch.nn.Module) -> bool:
        """Returns True if `attach_without_weights` and `init_parameter` support this base model."""
        return False

    def attach_without_weights(self, base: torch.nn.Module) -> torch.nn.Module:
        """Does the work of `attach` for a ``base`` on the meta device. The trained parameters are then on the meta
        device too."""
        raise NotImplementedError(f"{type(self).__name__} needs a base that is loaded whole")

    def init_parameter(self, name: str, shape: torch.Size, start: int, stop: int, rows: Rows) -> torch.Tensor:
        """Returns elements ``start`` to ``stop`` of the flattened parameter ``name``, with the values that `attach`
        gives it. Called after `attach_without_weights`.

        Every rank calls it for every parameter that the base model does not have, in the same order. ``rows(name,
        first, last)`` yields rows of a weight of the base model, a few at a time, and is collective."""
        raise NotImplementedError(f"{type(self).__name__} needs a base that is loaded whole")

    @abstractmethod
    def saved_names(self, model: torch.nn.Module) -> dict[str, str]:
        """Maps the name of each trainable parameter of ``model`` to its name in the saved file. Parameters that are
        saved in another form are left out."""

    def saved_shapes(self, model: torch.nn.Module, shape_of: ShapeOf) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every tensor of the saved file. ``shape_of`` returns the full shape of a parameter that
        may be sharded."""
        parameters = dict(model.named_parameters())
        return {saved: shape_of(parameters[name]) for name, saved in self.saved_names(model).items()}

    @abstractmethod
    def save(self, model: torch.nn.Module, weights: Mapping[str, torch.Tensor], folder: Path) -> None:
        """Writes ``weights`` (full tensors on the CPU, by parameter name) and the configuration into ``folder``."""

    def read_parameter(self, model: torch.nn.Module, name: str, read: Read) -> torch.Tensor:
        """Returns the full parameter ``name`` from a saved file. ``read`` returns a tensor of that file by its name."""
        return read(self.saved_names(model)[name])

    def after_restore(self, model: torch.nn.Module, read: Read) -> None:  # noqa: B027 - most have no more
        """Restores frozen parameters that depend on the trained ones. Every rank calls it, after the trained parameters
        have been loaded."""

    def state(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Returns the state that the method keeps between steps, besides parameters and optimizer state."""
        return {}

    def load_state(self, model: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
        assert not state, f"{type(self).__name__} keeps no state"

    def lr_scale(self, name: str) -> float:
        """Returns the factor by which the recipe's learning rate is multiplied for the parameter ``name``."""
        return 1.0

    def around_update(self, model: torch.nn.Module, step: int, total_steps: int) -> AbstractContextManager[Any]:
        """Returns a context for the optimizer's update of step ``step`` (from 1). It is entered when the step's
        gradients are complete and not yet clipped, and left before they are freed."""
        return nullcontext()

    def starts_at_zero(self, saved_name: str) -> bool:
        """Returns True if this tensor is zero before training. `verify_saved` uses it to detect a file that was saved
        without the trained values."""
        return False


def head_modules(base: Any) -> list[str]:
    """Returns the names of the base model's modules that every method trains in full: a sequence classifier's head."""
    inner = f"{getattr(base, 'base_model_prefix', '')}."
    trained = [name for name, parameter in base.named_parameters() if parameter.requires_grad]
    paths = [name.split(".")[: 2 if name.startswith(inner) else 1] for name in trained]
    return list(dict.fromkeys(".".join(path) for path in paths))


def make_adapter(recipe: Recipe) -> Adapter:
    adapter: Adapter = METHODS.load(recipe.adapter.kind)(recipe)
    return adapter
