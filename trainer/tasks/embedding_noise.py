"""Noise on the input embeddings of a training step.

NEFTune (Jain et al. 2023, arXiv:2310.05914): each embedding of a text of L tokens gets, in each of its D dimensions,
uniform noise from (-1, 1) · alpha / √(L D). L counts the tokens of a sample, whatever else is in its pack; a pad gets
none.

The noise is drawn from torch's generator, which the loop seeds for each micro-batch, so that it is the same on every
rank and after every resume.

Legend: B rows, L tokens of a row or a sample, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trainer.errors import InputError
from trainer.tasks.inputs import sample_bounds, to_device

if TYPE_CHECKING:
    from trainer.data import Batch
    from trainer.model.kernels.context import Context


class EmbeddingNoise:
    """Adds noise to the output of a model's input embeddings inside of `added`."""

    def __init__(self, model: Any, alpha: float) -> None:
        self._alpha, self._model = alpha, type(model).__name__
        self._range_BL: torch.Tensor | None = None
        self._calls = 0
        model.get_input_embeddings().register_forward_hook(self._add)

    @contextmanager
    def added(self, batch: Batch, context: Context | None, device: torch.device) -> Iterator[None]:
        """Adds noise in one forward of the micro-batch. ``context``: the ranks that compute it together. Raises
        InputError if the model does not read the tokens' embeddings."""
        lengths = sample_lengths(batch.position_ids)
        ranges = np.where(lengths > 1, self._alpha / np.sqrt(lengths), 0.0).astype(np.float32)
        self._range_BL = to_device(ranges if context is None else context.part(ranges), device)
        self._calls = 0
        try:
            yield
        finally:
            self._range_BL = None
        if not self._calls:
            raise self._refused("does not read the output of its input embeddings")

    def _add(self, _: Any, __: Any, embedded_BLD: torch.Tensor) -> torch.Tensor:
        if self._range_BL is None:
            return embedded_BLD
        if embedded_BLD.shape[:-1] != self._range_BL.shape:
            raise self._refused(f"embeds {list(embedded_BLD.shape[:-1])} tokens of {list(self._range_BL.shape)}")
        self._calls += 1
        noise_BLD = torch.empty_like(embedded_BLD).uniform_(-1.0, 1.0)
        noise_BLD *= (self._range_BL / math.sqrt(embedded_BLD.shape[-1]))[..., None]
        return embedded_BLD + noise_BLD

    def _refused(self, reason: str) -> InputError:
        return InputError(
            f"sft.neftune_alpha {self._alpha:g} does not work for {self._model}, which {reason}; leave it out"
        )


def sample_lengths(position_ids: np.ndarray) -> np.ndarray:
    """Returns, for each token of the rows [B, L], the number of tokens of its sample; 1 for a pad."""
    lengths = np.diff(sample_bounds(position_ids))
    return np.repeat(lengths, lengths).reshape(position_ids.shape)
