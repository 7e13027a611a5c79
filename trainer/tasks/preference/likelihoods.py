"""The likelihoods of answers, one per row of a micro-batch.

Shapes: R rows, T target tokens of all rows, row by row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from trainer.tasks.inputs import to_device
from trainer.tasks.lm_head_loss import TargetHead

if TYPE_CHECKING:
    from trainer.data import Batch


@dataclass(frozen=True)
class Answers:
    """The answers of a micro-batch. ``nll_T``: negative log-likelihood of each token. ``row_T``: its row. ``rows``: R;
    a micro-batch without samples has none."""

    nll_T: torch.Tensor
    row_T: torch.Tensor
    rows: int

    @classmethod
    def of(cls, head: TargetHead, module: torch.nn.Module, batch: Batch, device: torch.device, rows: int) -> Answers:
        """Computes the answers of the micro-batch's first ``rows`` rows, which have all of its targets."""
        return cls(head.losses(module, batch, device), to_device(batch.targets.nonzero()[0], device), rows)

    @property
    def tokens(self) -> torch.Tensor:
        """The number of tokens of each answer [R], float32."""
        return self._summed(torch.ones_like(self.nll_T))

    def log_likelihoods(self, weights_T: torch.Tensor | None = None) -> torch.Tensor:
        """Returns the log-likelihood of each answer [R]; with ``weights_T``, the weighted sum over its tokens."""
        return self._summed(-self.nll_T if weights_T is None else -weights_T * self.nll_T)

    def _summed(self, values_T: torch.Tensor) -> torch.Tensor:
        return torch.zeros(self.rows, device=values_T.device).index_add(0, self.row_T, values_T)


def shared_length_weights(targets: npt.NDArray[np.bool_], pairs: int, alpha: float) -> npt.NDArray[np.float32]:
    """Returns a weight [T] for each target of 2 · ``pairs`` rows: ``alpha`` for the tokens by which an answer is longer
    than the other answer of its pair, else 1 (LD-DPO, arXiv:2409.06411)."""
    if not pairs:
        return np.zeros(0, np.float32)
    lengths = targets.sum(-1)
    shared = np.tile(np.minimum(lengths[:pairs], lengths[pairs:]), 2)
    place = targets.cumsum(-1)[targets]
    return np.where(place <= shared.repeat(lengths), 1.0, alpha).astype(np.float32)
