"""Odds ratio preference optimisation: preferences and the chosen answers, learned together without a reference.

ORPO (Hong et al. 2024, arXiv:2403.07691). With l(y) the mean log-likelihood of an answer's tokens,

    log odds(y) = l(y) - log(1 - exp l(y))
    loss = 1/N Σ_i -l(c_i) - β log s(log odds(c_i) - log odds(r_i))

over the N pairs of a step, s the logistic function.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn.functional import logsigmoid

from trainer.tasks.preference.mean_likelihoods import ByMeanLikelihood

CERTAIN = -1e-7
"""The largest l(y) that has odds: those of a probability of 1 are infinite."""


class ORPO(ByMeanLikelihood):
    measured = ("nll", "log_odds")

    def pair_losses(
        self, chosen: torch.Tensor, rejected: torch.Tensor
    ) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        ratio = log_odds(chosen) - log_odds(rejected)
        return -chosen - self.section.beta * logsigmoid(ratio), {"log_odds": ratio}


def log_odds(means: torch.Tensor) -> torch.Tensor:
    means = means.clamp(max=CERTAIN)
    return means - torch.log(-torch.expm1(means))
