"""Losses of a frozen output head, with their derivative computed in the forward.

With logits z = W h and p = softmax(z), the negative log-likelihood of a label y is logsumexp(z) - z_y, and its
derivative by h is Wᵀ (p - onehot(y)). The gradient that arrives in the backward only adds one factor per row. So the
derivative is computed while the logits of a chunk exist: no logits are kept, the head does not run again in the
backward, and the backward is a product of two small arrays. A trained head needs these factors for its own gradient,
and uses `trainer.tasks.lm_head_loss.in_chunks` instead.

Legend: T targets, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

Project = Callable[[torch.Tensor], torch.Tensor]


def frozen_nll(project: Project, hidden_TD: torch.Tensor, labels_T: torch.Tensor, rows: int) -> torch.Tensor:
    """Returns the negative log-likelihoods [T] in float32. ``project`` computes logits [n, V] for at most ``rows``
    hidden states at a time. Only ``hidden_TD`` gets a gradient."""
    found: torch.Tensor = _FrozenNLL.apply(hidden_TD, labels_T, project, rows)  # type: ignore[no-untyped-call]
    return found


class _FrozenNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: torch.Tensor, labels_T: torch.Tensor, project: Project, rows: int) -> torch.Tensor:
        nll_T = torch.empty(len(labels_T), dtype=torch.float32, device=hidden_TD.device)
        slope_TD = torch.empty_like(hidden_TD)
        for start in range(0, len(labels_T), rows):
            chunk = slice(start, start + rows)
            nll_T[chunk], slope_TD[chunk] = _of_chunk(project, hidden_TD[chunk], labels_T[chunk])
        ctx.save_for_backward(slope_TD)
        return nll_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_T: torch.Tensor) -> Any:
        (slope_TD,) = ctx.saved_tensors
        return (gradient_T[:, None] * slope_TD).to(slope_TD.dtype), None, None, None


def _of_chunk(project: Project, hidden_TD: torch.Tensor, labels_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the losses and their derivatives by the hidden states."""
    with torch.enable_grad():
        hidden_TD = hidden_TD.detach().requires_grad_()
        made_TV = project(hidden_TD)
    logits_TV = made_TV.detach().float()
    log_sums_T = logits_TV.logsumexp(-1)
    labels_T1 = labels_T[:, None]
    nll_T = log_sums_T - logits_TV.gather(-1, labels_T1)[:, 0]
    # In place: the logits are not needed any more.
    moved_TV = logits_TV.sub_(log_sums_T[:, None]).exp_()
    moved_TV.scatter_add_(-1, labels_T1, torch.full_like(labels_T1, -1, dtype=moved_TV.dtype))
    (slope_TD,) = torch.autograd.grad(made_TV, hidden_TD, moved_TV.to(made_TV.dtype))
    return nll_T, slope_TD
