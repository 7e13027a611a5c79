"""Supervised fine-tuning: the likelihood of the target tokens, given all tokens before them in the same sample."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from trainer.tasks.base import GenerationContext, LossOutput, Task, ratio
from trainer.tasks.cross_entropy import CrossEntropy
from trainer.tasks.embedding_noise import EmbeddingNoise
from trainer.tasks.lm_head_loss import TargetHead
from trainer.tasks.router_loss import RouterLoss, router_metrics
from trainer.tasks.source_weights import weighted

if TYPE_CHECKING:
    from trainer.data import Batch

MAX_EXPONENT = 700.0


class SFT(Task):
    _router: RouterLoss | None = None
    _noise: EmbeddingNoise | None = None

    def attach(self, model: torch.nn.Module, generation: GenerationContext | None = None) -> None:
        self.head = TargetHead(model, packed=self.recipe.data.packing)
        coefficient = self.recipe.training.router_aux_loss_coef
        self._router = None if coefficient is None else RouterLoss(model, coefficient)
        alpha = self.recipe.sft.neftune_alpha
        self._noise = None if alpha is None else EmbeddingNoise(model, alpha)

    def loss(self, module: torch.nn.Module, batch: Batch, device: torch.device) -> LossOutput:
        if not module.training:
            return LossOutput(self.head.losses(module, batch, device).sum(), {})
        with self._noise.added(batch, self.head.context, device) if self._noise else nullcontext():
            if self._router:
                return self._router.added(
                    lambda recording: self.loss_sum(recording, batch, device), module, batch, device
                )
            return LossOutput(self.loss_sum(module, batch, device), {})

    def loss_sum(self, module: torch.nn.Module, batch: Batch, device: torch.device) -> torch.Tensor:
        """Returns the sum of the losses of training."""
        formula = CrossEntropy(self.recipe.sft.label_smoothing)
        losses_T: torch.Tensor = self.head.losses(module, batch, device, formula)
        return weighted(losses_T, batch.target_sources, self.recipe, training=True).sum()

    def metrics(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        loss = ratio(sums, "loss")
        return {"loss": loss, "perplexity": math.exp(min(loss, MAX_EXPONENT))}

    def step_metrics(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        return router_metrics(sums) if self._router else {}
