"""The losses of PPO, one number per token.

Legend: T tokens of the texts of a micro-batch; all tensors [T], float32.
"""

from __future__ import annotations

import torch


def policy_loss(
    logps: torch.Tensor, old_logps: torch.Tensor, advantages: torch.Tensor, clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the clipped loss (Schulman et al. 2017, arXiv:1707.06347, equation 7, with opposite sign), with
    q = p / p_old:

    max(-A q, -A clip(q, 1 - ε, 1 + ε))

    Returns the loss, and a mask of the tokens at which the clipped term is the larger one."""
    ratio = (logps - old_logps).exp()
    free, held = -advantages * ratio, -advantages * ratio.clamp(1.0 - clip, 1.0 + clip)
    return torch.maximum(free, held), (held > free).detach()


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip: float | None
) -> torch.Tensor:
    """Computes half of the squared error: the larger one of the error of the value and that of the value clipped to
    ``old_values`` ± ``clip`` (Schulman et al.'s program; Huang et al. 2022, *The 37 implementation details of PPO*,
    9)."""
    error = (values - returns).square()
    if clip is not None:
        held = torch.minimum(torch.maximum(values, old_values - clip), old_values + clip)
        error = torch.maximum(error, (held - returns).square())
    return 0.5 * error
