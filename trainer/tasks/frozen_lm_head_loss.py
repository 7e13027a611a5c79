"""Losses of a frozen output head, with their derivative computed in the forward.

With logits z = W h, the derivative of a target's cross entropy by h is Wᵀ times its derivative by z, which is
softmax(z) - onehot(y) for the negative log-likelihood of a label y (`trainer.tasks.cross_entropy`). The gradient that
arrives in the backward only adds one factor per row. So the derivative is computed while the logits of a chunk exist:
no logits are kept, the head does not run again in the backward, and the backward is a product of two small arrays. The
same holds for any loss of a row's logits. A trained head needs these factors for its own gradient, and uses
`trainer.tasks.lm_head_loss.in_chunks` instead.

Legend: T targets, D hidden size, V vocabulary, m values of a target, of which the first is its loss.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from trainer.tasks.cross_entropy import CrossEntropy

Project = Callable[[torch.Tensor], torch.Tensor]
OfChunk = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Returns the values [n, m], and the derivative [n, D] of the first one, from hidden states [n, D] and a row of
numbers [n] for them: labels, or their places."""
OfRows = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Returns the values [n, m] with a graph."""


def frozen_cross_entropy(
    project: Project, hidden_TD: torch.Tensor, labels_T: torch.Tensor, rows: int, formula: CrossEntropy
) -> torch.Tensor:
    """Returns the losses [T] in float32. ``project`` computes logits [n, V] for at most ``rows`` hidden states at a
    time. Only ``hidden_TD`` gets a gradient."""
    return _frozen(partial(_of_chunk, project, formula), hidden_TD, labels_T, rows, 1)[:, 0]


def frozen_losses(of: OfRows, hidden_TD: torch.Tensor, rows_T: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Returns the values [T, columns] of ``of`` in float32, which gets at most ``rows`` rows at a time. Only the first
    column has a gradient, and only ``hidden_TD`` gets one."""

    def of_chunk(hidden_nD: torch.Tensor, rows_n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.enable_grad():
            hidden_nD = hidden_nD.detach().requires_grad_()
            values = of(hidden_nD, rows_n)
            (slope_nD,) = torch.autograd.grad(values[:, 0].sum(), hidden_nD)
        return values.detach(), slope_nD

    return _frozen(of_chunk, hidden_TD, rows_T, rows, columns)


def _frozen(of_chunk: OfChunk, hidden_TD: torch.Tensor, rows_T: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    found: torch.Tensor = _FrozenValues.apply(hidden_TD, rows_T, of_chunk, rows, columns)  # type: ignore[no-untyped-call]
    return found


class _FrozenValues(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: torch.Tensor, rows_T: torch.Tensor, of_chunk: OfChunk, rows: int, columns: int
    ) -> torch.Tensor:
        values = torch.empty(len(rows_T), columns, dtype=torch.float32, device=hidden_TD.device)
        slope_TD = torch.empty_like(hidden_TD)
        for start in range(0, len(rows_T), rows):
            chunk = slice(start, start + rows)
            values[chunk], slope_TD[chunk] = of_chunk(hidden_TD[chunk], rows_T[chunk])
        ctx.save_for_backward(slope_TD)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (slope_TD,) = ctx.saved_tensors
        return (gradient[:, :1] * slope_TD).to(slope_TD.dtype), None, None, None, None


def _of_chunk(
    project: Project, formula: CrossEntropy, hidden_TD: torch.Tensor, labels_T: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the losses [n, 1] and their derivatives by the hidden states."""
    with torch.enable_grad():
        hidden_TD = hidden_TD.detach().requires_grad_()
        made_TV = project(hidden_TD)
    losses_T, slopes_TV = formula.with_slopes(made_TV.detach().float(), labels_T)
    (slope_TD,) = torch.autograd.grad(made_TV, hidden_TD, slopes_TV.to(made_TV.dtype))
    return losses_T[:, None], slope_TD
