"""The losses of direct preference optimisation: functions of how far the model has moved from the reference.

With the log-ratios c = log π(chosen|x) - log π_ref(chosen|x) and r, the rejected answer's, s the logistic function and
Δ = β (c - r):

    sigmoid    -(1 - ε) log s(Δ) - ε log s(-Δ)           Rafailov et al. 2023, arXiv:2305.18290; with ε > 0 conservative
                                                         labels (Mitchell 2023, "A note on DPO with noisy preferences")
    robust     (-(1 - ε) log s(Δ) + ε log s(-Δ)) / (1 - 2ε)     Chowdhury et al. 2024, arXiv:2403.00409: unbiased where
                                                         a share ε of the preferences is swapped
    hinge      max(0, 1 - Δ)                             SLiC, Zhao et al. 2023, arXiv:2305.10425
    ipo        (c/|c| - r/|r| - 1/(2β))²                 Azar et al. 2023, arXiv:2310.12036, equation 17, with
                                                         log-ratios per token, as the authors' results have them
    sppo       (c - 1/(2β))² + (r + 1/(2β))²             Wu et al. 2024, arXiv:2405.00675, equation 4.7, where the
                                                         chosen answer always wins
    apo_zero   1 - s(βc) + s(βr)                         D'Oosterlinck et al. 2024, arXiv:2408.06266, equation 7
    apo_down   s(βc) + 1 - s(Δ)                          the same, equation 8
    discopop   (1 - m) (-log s(Δ)) + m e^-Δ, m = s(Δ/τ)  Lu et al. 2024, arXiv:2406.08414, equation 5
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid

from trainer.recipe.sections.preference import DPOSection


@dataclass(frozen=True)
class LogRatios:
    """The log-ratios of both answers to each pair, and the answers' numbers of tokens; float32 tensors [P]."""

    chosen: torch.Tensor
    rejected: torch.Tensor
    chosen_tokens: torch.Tensor
    rejected_tokens: torch.Tensor

    @property
    def difference(self) -> torch.Tensor:
        return self.chosen - self.rejected


def sigmoid(ratios: LogRatios, section: DPOSection) -> torch.Tensor:
    delta, noise = section.beta * ratios.difference, section.label_smoothing
    return -(1 - noise) * logsigmoid(delta) - noise * logsigmoid(-delta)


def robust(ratios: LogRatios, section: DPOSection) -> torch.Tensor:
    delta, noise = section.beta * ratios.difference, section.label_smoothing
    return (-(1 - noise) * logsigmoid(delta) + noise * logsigmoid(-delta)) / (1 - 2 * noise)


def hinge(ratios: LogRatios, section: DPOSection) -> torch.Tensor:
    return (1 - section.beta * ratios.difference).relu()


def ipo(ratios: LogRatios, section: DPOSection) -> torch.Tensor:
    per_token = ratios.chosen / ratios.chosen_tokens - ratios.rejected / ratios.rejected_tokens
    return (per_token - 1 / (2 * section.beta)).square()


def sppo(ratios: LogRatios, section: DPOSection) -> torch.Tensor:
    return (ratios.chosen - 0.5 / section.beta).square() + (ratios.rejected + 0.5 / section.beta).square()


def apo_zero(ratios: LogRatios, section: DPOSection) -> torch.Tensor:
    return 1 - (section.beta * ratios.chosen).sigmoid() + (section.beta * ratios.rejected).sigmoid()


def apo_down(ratios: LogRatios, section: DPOSection) -> torch.Tensor:
    return (section.beta * ratios.chosen).sigmoid() + 1 - (section.beta * ratios.difference).sigmoid()


def discopop(ratios: LogRatios, section: DPOSection) -> torch.Tensor:
    delta = section.beta * ratios.difference
    mixed = (delta / section.discopop_tau).sigmoid()
    return -logsigmoid(delta) * (1 - mixed) + (-delta).exp() * mixed
