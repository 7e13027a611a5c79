"""The seam of an adapter method: what a method does for a run.

A method is one file and one line in the registry. It turns a frozen base into a model with trainable parameters, says
under which names those are saved, and writes the files that a plain ``peft`` (or ``transformers``) loads unaided.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.recipe import Recipe
from trainer.registry import METHODS

if TYPE_CHECKING:
    import torch


class Adapter(ABC):
    """One run's adapter. ``weights_file`` is the file that holds what was trained."""

    weights_file = "adapter_model.safetensors"

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    @property
    def full(self) -> bool:
        """Whether every parameter of the base is trained."""
        return False

    @abstractmethod
    def attach(self, base: torch.nn.Module) -> torch.nn.Module:
        """The model to train. Its initial values depend on the seed and the parameters' names alone, never on the rank.

        Raises InputError when the recipe's settings do not fit the model."""

    @abstractmethod
    def saved_names(self, model: torch.nn.Module) -> dict[str, str]:
        """Name in the saved file for the name of each trainable parameter of ``model``."""

    @abstractmethod
    def save(self, model: torch.nn.Module, weights: Mapping[str, torch.Tensor], folder: Path) -> None:
        """Writes ``weights`` (whole tensors on the CPU, by parameter name) and the configuration into ``folder``."""

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
    adapter: Adapter = METHODS.load(recipe.adapter.method)(recipe)
    return adapter
