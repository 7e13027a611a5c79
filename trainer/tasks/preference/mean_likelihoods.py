"""Preferences without a reference: losses of the mean log-likelihood of each answer's tokens.

For an answer y of n tokens to a prompt x, the mean is l(y) = 1/n log p(y | x). A loss is a function of l(chosen) and
l(rejected) of one pair, so that neither ranks nor micro-batches change what it is divided by.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from trainer.tasks.base import GenerationContext, LossOutput, Task
from trainer.tasks.lm_head_loss import TargetHead
from trainer.tasks.preference.likelihoods import Answers
from trainer.tasks.preference.pairs import evaluated, pair_metrics, pair_sums
from trainer.tasks.source_weights import weighted

if TYPE_CHECKING:
    from trainer.data import Batch, StepPlan


class ByMeanLikelihood(Task):
    """A task whose reward of an answer is beta · l(y). ``measured``: metrics besides those of pairs."""

    measured: tuple[str, ...] = ("nll",)

    def attach(self, model: torch.nn.Module, generation: GenerationContext | None = None) -> None:
        self.head = TargetHead(model)

    def loss_units(self, of: StepPlan | Batch) -> int:
        return of.samples

    @property
    def section(self) -> Any:
        """The task's section of the recipe, with its ``beta``."""
        return getattr(self.recipe, self.recipe.task)

    @abstractmethod
    def pair_losses(
        self, chosen: torch.Tensor, rejected: torch.Tensor
    ) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """Returns the losses [pairs] by l of both answers to each pair, and the values [pairs] that are ``measured``
        besides ``nll``."""

    def loss(self, module: torch.nn.Module, batch: Batch, device: torch.device) -> LossOutput:
        answers = Answers.of(self.head, module, batch, device, 2 * batch.pairs)
        chosen, rejected = (answers.log_likelihoods() / answers.tokens).view(2, -1)
        losses, values = self.pair_losses(chosen, rejected)
        losses = weighted(losses, batch.sources, self.recipe, training=module.training)
        sums = {name: value.detach().sum() for name, value in {"nll": -chosen, **values}.items()}
        return LossOutput(losses.sum(), pair_sums(self.section.beta * chosen, self.section.beta * rejected) | sums)

    def metrics(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        return {**evaluated(sums), **self._means(sums)}

    def step_metrics(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        return {**pair_metrics(sums), **self._means(sums)}

    def _means(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        return {name: float(sums[name]) / max(1.0, float(sums["pairs"])) for name in self.measured}
