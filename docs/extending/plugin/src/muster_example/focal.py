"""Focal loss (Lin et al. 2017, arXiv:1708.02002): tokens that the model is sure of count less.

loss = 1/N Σ (1 - p)^gamma · -log p
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from trainer.tasks.sft import SFT

if TYPE_CHECKING:
    from trainer.data import Batch


class Focal(SFT):
    def loss_sum(self, module: torch.nn.Module, batch: Batch, device: torch.device) -> torch.Tensor:
        nll_T = self.head.losses(module, batch, device)
        return ((1 - torch.exp(-nll_T)) ** self.recipe.focal.gamma * nll_T).sum()
