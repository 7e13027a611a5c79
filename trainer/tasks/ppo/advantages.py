"""Advantages from scores: pure functions in numpy (float64), on rows of different lengths, without ranks or models.

Legend: R tokens of a text.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Row = npt.NDArray[np.float64]
FLOOR = 1e-8


def divergence(policy_R: Row, reference_R: Row, estimator: str) -> Row:
    """Estimates KL(policy, reference) at each sampled token, from both log-probabilities (Schulman 2020, *Approximating
    KL divergence*), with Δ = log p - log p_reference:

    k1 = Δ        k3 = exp(-Δ) - 1 + Δ
    """
    difference = policy_R - reference_R
    return difference if estimator == "k1" else np.expm1(-difference) + difference


def token_rewards(score: float, kl_R: Row, kl_coef: float) -> Row:
    """Returns -kl_coef · KL at each token, plus the text's score at its last token (Ziegler et al. 2019, 2.1)."""
    rewards = -kl_coef * kl_R
    rewards[-1] += score
    return rewards


def gae(rewards_R: Row, values_R: Row, gamma: float, lam: float) -> Row:
    """Computes generalised advantage estimation (Schulman et al. 2016, arXiv:1506.02438, equation 16). The end of the
    text is the end of the episode; V = 0 after it:

    δ_t = r_t + gamma · V_{t+1} - V_t        A_t = δ_t + gamma · lam · A_{t+1}
    """
    advantages = np.zeros_like(rewards_R)
    last = following = 0.0
    for t in range(len(rewards_R) - 1, -1, -1):
        delta = rewards_R[t] + gamma * following - values_R[t]
        last = delta + gamma * lam * last
        advantages[t], following = last, values_R[t]
    return advantages


def whitened(rows: Sequence[Row], *, centred: bool) -> list[Row]:
    """Divides all rows by their common standard deviation. ``centred``: also subtracts the mean; otherwise the mean
    does not change."""
    flat = np.concatenate(rows)
    mean, scale = flat.mean(), 1.0 / np.sqrt(flat.var() + FLOOR)
    return [(row - mean) * scale + (0.0 if centred else mean) for row in rows]


def explained_variance(values: Row, returns: Row) -> float:
    """Returns 1 - Var(returns - values) / Var(returns): 1 if the values predict the returns, 0 if they carry no
    information; 0 also if all returns are equal."""
    spread = float(returns.var())
    return 1.0 - float((returns - values).var()) / spread if spread > FLOOR else 0.0


def adapted_kl_coef(kl_coef: float, kl: float, target: float, texts: int, horizon: int) -> float:
    """Returns the next KL coefficient (Ziegler et al. 2019, 2.2, as in their program). A mean divergence ``kl`` of
    ``texts`` texts changes it by at most a fifth per ``horizon`` texts:

    e = clip(kl / target - 1, -0.2, 0.2)        kl_coef · (1 + e · texts / horizon)
    """
    error = min(0.2, max(-0.2, kl / target - 1.0))
    return kl_coef * (1.0 + error * texts / horizon)
