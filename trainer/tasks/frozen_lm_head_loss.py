"""Losses of a frozen output head, with their derivative computed in the forward.

With logits z = W h, the derivative of a target's loss by h is Wᵀ times its derivative by z, which a formula gives
(`trainer.tasks.token_losses.TokenLoss.with_slopes`); for the negative log-likelihood of a label y it is
softmax(z) - onehot(y). The gradient that arrives in the backward only adds one factor per row. So the derivative is
computed while the logits of a chunk exist: no logits are kept, the head does not run again in the backward, and the
backward is a product of two small arrays. A trained head needs these factors for its own gradient, and uses
`trainer.tasks.lm_head_loss.in_chunks` instead.

Legend: T targets, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from trainer.tasks.token_losses import TokenLoss

Project = Callable[[torch.Tensor], torch.Tensor]


def frozen_losses(
    project: Project, hidden_TD: torch.Tensor, labels_T: torch.Tensor, rows: int, formula: TokenLoss
) -> torch.Tensor:
    """Returns the losses [T] in float32. ``project`` computes logits [n, V] for at most ``rows`` hidden states at a
    time. Only ``hidden_TD`` gets a gradient."""
    found: torch.Tensor = _FrozenLosses.apply(hidden_TD, labels_T, project, rows, formula)  # type: ignore[no-untyped-call]
    return found


class _FrozenLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: torch.Tensor, labels_T: torch.Tensor, project: Project, rows: int, formula: TokenLoss
    ) -> torch.Tensor:
        losses_T = torch.empty(len(labels_T), dtype=torch.float32, device=hidden_TD.device)
        slope_TD = torch.empty_like(hidden_TD)
        for start in range(0, len(labels_T), rows):
            chunk = slice(start, start + rows)
            losses_T[chunk], slope_TD[chunk] = _of_chunk(project, hidden_TD[chunk], labels_T[chunk], formula)
        ctx.save_for_backward(slope_TD)
        return losses_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_T: torch.Tensor) -> Any:
        (slope_TD,) = ctx.saved_tensors
        return (gradient_T[:, None] * slope_TD).to(slope_TD.dtype), None, None, None, None


def _of_chunk(
    project: Project, hidden_TD: torch.Tensor, labels_T: torch.Tensor, formula: TokenLoss
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the losses and their derivatives by the hidden states."""
    with torch.enable_grad():
        hidden_TD = hidden_TD.detach().requires_grad_()
        made_TV = project(hidden_TD)
    losses_T, slopes_TV = formula.with_slopes(made_TV.detach().float(), labels_T)
    (slope_TD,) = torch.autograd.grad(made_TV, hidden_TD, slopes_TV.to(made_TV.dtype))
    return losses_T, slope_TD
