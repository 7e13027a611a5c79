"""Divergences between two distributions over the same outcomes, from their log-probabilities.

With p of the teacher and q of the student, summed over the outcomes:

    forward_kl    KL(p, q) = Σ p (log p - log q)                          (Hinton et al. 2015, arXiv:1503.02531)
    reverse_kl    KL(q, p) = Σ q (log q - log p)                          (Gu et al. 2023, arXiv:2306.08543)
    jsd           β KL(p, m) + (1 - β) KL(q, m), m = β p + (1 - β) q      (Agarwal et al. 2023, arXiv:2306.13649)

Legend: n targets, V tokens, k of them that are most likely to the teacher, K outcomes: V, or k + 1 where all other
tokens count as one. Coarser outcomes never have a larger divergence (the data-processing inequality).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

LEAST_REST = 2.0**-23
"""The least probability of the tokens that are not among the k: float32 does not tell k that add up to more from 1."""

Divergence = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Returns [n] from the log-probabilities [n, K] of teacher and student."""


def kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def jsd(beta: float, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * kl(log_p, log_m) + (1.0 - beta) * kl(log_q, log_m)


def divergence(loss: str, beta: float) -> Divergence:
    """Returns the function that ``distill.loss`` names."""
    made: dict[str, Divergence] = {
        "forward_kl": kl,
        "reverse_kl": lambda log_p, log_q: kl(log_q, log_p),
        "jsd": lambda log_p, log_q: jsd(beta, log_p, log_q),
    }
    return made[loss]


def with_rest(log_p_nk: torch.Tensor) -> torch.Tensor:
    """Returns the log-probabilities [n, k + 1] of k outcomes and of the rest."""
    rest = (1.0 - log_p_nk.double().exp().sum(-1, keepdim=True)).clamp_min(LEAST_REST)
    return torch.cat([log_p_nk, rest.log().to(log_p_nk.dtype)], -1)


def at_tokens(logits_nV: torch.Tensor, ids_nk: torch.Tensor) -> torch.Tensor:
    """Returns the log-probabilities [n, k + 1] of the tokens ``ids_nk``, and of all others, under a softmax of the
    logits."""
    log_sum = logits_nV.logsumexp(-1, keepdim=True)
    # Not one minus the others: that would lose a small rest.
    rest = logits_nV.scatter(-1, ids_nk, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logits_nV.gather(-1, ids_nk), rest], -1) - log_sum
