"""The cross entropy of a target token, as a function of the logits before it.

With a smoothing ε (Szegedy et al. 2015, arXiv:1512.00567) it compares the model's distribution p with one that gives a
share of ε evenly to all V tokens of the vocabulary:

    loss = -(1 - ε) log p(y) - ε/V Σ_v log p(v)

Legend: T targets, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy


@dataclass(frozen=True)
class CrossEntropy:
    """The formula with its smoothing. Logits and losses are in float32."""

    smoothing: float = 0.0

    def losses(self, logits_TV: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
        """Returns the losses [T], with a gradient."""
        return cross_entropy(logits_TV, labels_T, reduction="none", label_smoothing=self.smoothing)

    def with_slopes(self, logits_TV: torch.Tensor, labels_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the losses [T] and their derivatives by the logits [T, V], without a graph. Overwrites the logits."""
        log_sums_T, labels_T1 = logits_TV.logsumexp(-1), labels_T[:, None]
        losses_T = log_sums_T - logits_TV.gather(-1, labels_T1)[:, 0]
        if self.smoothing:  # a logit of -inf times a smoothing of 0 would not be a number
            losses_T += self.smoothing * (log_sums_T - logits_TV.mean(-1) - losses_T)
        # In place: the logits are not needed any more.
        slopes_TV = logits_TV.sub_(log_sums_T[:, None]).exp_()
        if self.smoothing:
            slopes_TV -= self.smoothing / slopes_TV.shape[-1]
        share = self.smoothing - 1.0
        slopes_TV.scatter_add_(-1, labels_T1, torch.full_like(labels_T1, share, dtype=slopes_TV.dtype))
        return losses_T, slopes_TV


NLL = CrossEntropy()
"""The negative log-likelihood of each target."""
