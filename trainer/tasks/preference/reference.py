"""The reference of a task: two log-likelihoods per sample, by the model as it was before the first step.

Legend: N samples of a micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from trainer.tasks.inputs import to_device
from trainer.tasks.reference import adapter_off

if TYPE_CHECKING:
    from trainer.data import Batch
    from trainer.recipe import Recipe


NAME = "reference"


class Reference:
    """Holds the reference's values of the micro-batches of a step. ``stored``: they were computed before the first step
    and come with the micro-batches; otherwise the model computes them with its adapter switched off."""

    def __init__(self, recipe: Recipe, model: Any) -> None:
        self.stored = recipe.stores_outputs
        self._model = model
        self._values: dict[int, torch.Tensor] = {}

    def prepare(self, batches: Sequence[Batch], compute: Callable[[Batch], torch.Tensor], device: torch.device) -> None:
        """Takes the values of a step's micro-batches: stored ones, or those that ``compute`` returns, [2, N]."""
        self._values = {}
        if self.stored:
            for batch in batches:
                values = batch.outputs[NAME] if batch.samples else np.zeros(0, np.float32)
                self._values[batch.index] = to_device(values.reshape(-1, 2).T.copy(), device)
            return
        with adapter_off(self._model):
            self._values = {batch.index: compute(batch) for batch in batches}

    def of(self, batch: Batch) -> torch.Tensor:
        """Returns the values [2, N]."""
        return self._values[batch.index]


def to_store(values_2N: torch.Tensor) -> dict[str, npt.NDArray[np.float32]]:
    """Returns the values as `Task.outputs`."""
    return {NAME: values_2N.T.float().cpu().numpy()}
