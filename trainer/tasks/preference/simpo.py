"""Simple preference optimisation: preferences by the mean log-likelihoods of answers, without a reference.

SimPO (Meng et al. 2024, arXiv:2405.14734). With l(y) the mean log-likelihood of an answer's tokens, conservative labels
that assume that a share ε of the preferences is reversed, and the likelihood of the chosen answer as in CPO (Xu et al.
2024, arXiv:2401.08417):

    Δ_i  = β (l(c_i) - l(r_i)) - gamma
    loss = 1/N Σ_i -(1 - ε) log s(Δ_i) - ε log s(-Δ_i) - cpo_alpha l(c_i)

over the N pairs of a step, s the logistic function.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn.functional import logsigmoid

from trainer.tasks.preference.mean_likelihoods import ByMeanLikelihood


class SimPO(ByMeanLikelihood):
    def pair_losses(
        self, chosen: torch.Tensor, rejected: torch.Tensor
    ) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        section = self.section
        difference, noise = section.beta * (chosen - rejected) - section.gamma, section.label_smoothing
        preferred = -(1 - noise) * logsigmoid(difference) - noise * logsigmoid(-difference)
        return preferred - section.cpo_alpha * chosen, {}
