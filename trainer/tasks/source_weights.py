"""Weights of the sources in the loss of a training step (``data.train[i].loss_weight``).

The loss of each unit (a target token, a sample, a pair) is multiplied by the weight of its source, and the sum is still
divided by the number of units. Evaluations have no weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from trainer.tasks.inputs import to_device

if TYPE_CHECKING:
    from trainer.data.types import Ints
    from trainer.recipe import Recipe


def weighted(losses_U: torch.Tensor, sources_U: Ints, recipe: Recipe, *, training: bool) -> torch.Tensor:
    """Returns the losses of units times the weights of their sources. ``sources_U``: the source of each unit, which is
    `Batch.sources` for samples and pairs, and `Batch.target_sources` for target tokens."""
    weights = np.array([source.loss_weight for source in recipe.data.train], np.float32)
    if not training or (weights == 1.0).all():
        return losses_U
    return losses_U * to_device(weights[sources_U], losses_U.device)
