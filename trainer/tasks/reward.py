"""A reward model: one number for an answer, trained on pairs in which one answer is preferred.

Bradley & Terry (1952, doi:10.2307/2334029): the chosen answer c is preferred to the rejected one r with probability
s(R(c) - R(r)), s the logistic function. A margin m, if the data have one, is a minimum distance of the rewards (Touvron
et al. 2023, arXiv:2307.09288, 3.2.2):

    loss = 1/N Σ_i -log s(R(c_i) - R(r_i) - m_i)    over the N pairs of a step
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import logsigmoid

from trainer.tasks.base import GenerationContext, LossOutput, Task
from trainer.tasks.inputs import to_device
from trainer.tasks.preference.pairs import evaluated, pair_metrics, pair_sums
from trainer.tasks.sequences import SequenceOutputs
from trainer.tasks.source_weights import weighted

if TYPE_CHECKING:
    from trainer.data import Batch, StepPlan
    from trainer.model.kernels.context import Context


class Reward(Task):
    labels = ("reward",)

    def attach(self, model: torch.nn.Module, generation: GenerationContext | None = None) -> None:
        self._outputs = SequenceOutputs(model)

    def compute_together(self, context: Context) -> None:
        self._outputs.context = context

    def loss_units(self, of: StepPlan | Batch) -> int:
        return of.samples

    def loss(self, module: torch.nn.Module, batch: Batch, device: torch.device) -> LossOutput:
        rewards = self._outputs.of(module, batch, device)[: 2 * batch.pairs, 0].float()
        chosen, rejected = rewards[: batch.pairs], rewards[batch.pairs :]
        margins = to_device(batch.margins, device)
        loss = weighted(-logsigmoid(chosen - rejected - margins), batch.sources, self.recipe, training=module.training)
        return LossOutput(loss.sum(), pair_sums(chosen, rejected))

    def metrics(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        return evaluated(sums)

    def step_metrics(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        return pair_metrics(sums)
