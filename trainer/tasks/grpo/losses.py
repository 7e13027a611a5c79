"""The losses of ``grpo``, one number per token.

With A the advantage of a text, q_t the ratio of a token's probability under the policy to that under the policy that
wrote the text, n the text's tokens, N the texts, and e_low and e_high the limits, a token's loss is

    clipped      -min(q A, clip(q, 1 - e_low, 1 + e_high) A)
    truncated    -sg(min(q, 1 + e_high)) A log p        sg: without a gradient

where q is q_t, or a number of the text (`Level`), and the loss of an update is a mean over them (`Mean`):

    grpo      clipped, q_t;          1/N sum over texts of 1/n sum over tokens    Shao et al. 2024, arXiv:2402.03300
    dr_grpo   clipped, q_t;          the same with 1/max_new_tokens for 1/n       Liu et al. 2025, arXiv:2503.20783
    dapo      clipped, q_t;          sum over all tokens / number of tokens       Yu et al. 2025, arXiv:2503.14476
    gspo      clipped, (prod q)^1/n; as grpo                                      Zheng et al. 2025, arXiv:2507.18071
    cispo     truncated, q_t;        as dapo                                      MiniMax 2025, arXiv:2506.13585
    rloo      clipped, prod q;       as grpo                                      Ahmadian et al. 2024, arXiv:2402.14740

Legend: T tokens of the texts of a micro-batch; all tensors [T], float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from trainer.recipe.sections.rollouts.losses import Level


class TokenLoss(NamedTuple):
    """``loss``: with a gradient. ``low``, ``high``: where the limit below or above decides, which ends the gradient."""

    loss: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor


def log_ratios(logps: torch.Tensor, old_logps: torch.Tensor, lengths: Sequence[int], level: Level) -> torch.Tensor:
    """Returns log q for each token; that of a text is the same for all of its tokens. ``lengths``: of the texts."""
    ratios = logps - old_logps
    if level == "token" or not lengths:
        return ratios
    # Split and not index_add, whose order of additions is not fixed on GPUs.
    joined = [row.mean() if level == "sequence" else row.sum() for row in ratios.split(list(lengths))]
    return per_token(torch.stack(joined), lengths)


def per_token(values: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Repeats the value of each text for its tokens."""
    repeats = torch.tensor(lengths, dtype=torch.int64, device=values.device)
    return values.repeat_interleave(repeats, output_size=sum(lengths))


def clipped(
    logps: torch.Tensor, log_ratios: torch.Tensor, advantages: torch.Tensor, clip: tuple[float, float]
) -> TokenLoss:
    ratio = log_ratios.exp()
    free, held = -advantages * ratio, -advantages * ratio.clamp(1.0 - clip[0], 1.0 + clip[1])
    decides = (held > free).detach()
    return TokenLoss(torch.maximum(free, held), decides & (advantages < 0), decides & (advantages > 0))


def truncated(
    logps: torch.Tensor, log_ratios: torch.Tensor, advantages: torch.Tensor, clip: tuple[float, float]
) -> TokenLoss:
    ratio = log_ratios.detach().exp()
    high = ratio > 1.0 + clip[1]
    return TokenLoss(-ratio.clamp(max=1.0 + clip[1]) * advantages * logps, torch.zeros_like(high), high)


def divergence(logps: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Estimates KL(policy, reference) at each token (k3; Schulman 2020, *Approximating KL divergence*), with
    d = log p_reference - log p: exp(d) - 1 - d."""
    delta = reference - logps
    return delta.exp() - 1.0 - delta


def importance(logps: torch.Tensor, sampled: torch.Tensor, cap: float | None) -> torch.Tensor:
    """Returns the weight of each token of a text that another engine wrote: min(p / p_engine, ``cap``), without a
    gradient (truncated importance sampling: Ionides 2008; Yao et al. 2025, *Your efficient RL framework secretly brings
    you off-policy RL training*). 1 without a cap."""
    if cap is None:
        return torch.ones_like(logps)
    return (logps - sampled).detach().exp().clamp(max=cap)
