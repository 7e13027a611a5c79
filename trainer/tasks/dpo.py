"""Direct preference optimisation: preferences without a reward model.

DPO (Rafailov et al. 2023, arXiv:2305.18290). The reward of an answer y to a prompt x is the change of its likelihood by
training, R(y) = β log(π(y|x) / π_ref(y|x)). With conservative labels (Mitchell 2023, "A note on DPO with noisy
preferences"), which assume that a share ε of the preferences is reversed:

    Δ_i  = R(c_i) - R(r_i)
    loss = 1/N Σ_i -(1 - ε) log s(Δ_i) - ε log s(-Δ_i)    over the N pairs of a step, s the logistic function

The reference is the base model: the same model with its adapter switched off, so that no second model is in memory. Its
likelihoods are computed before the losses of a step, without dropout, and kept for the step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import logsigmoid

from trainer.tasks.base import GenerationContext, LossOutput, Task
from trainer.tasks.inputs import to_device
from trainer.tasks.lm_head_loss import TargetHead
from trainer.tasks.pairs import evaluated, pair_metrics, pair_sums
from trainer.tasks.reference import adapter_off
from trainer.tasks.source_weights import weighted

if TYPE_CHECKING:
    from trainer.data import Batch, StepPlan


class DPO(Task):
    prepares_steps = True

    def attach(self, model: torch.nn.Module, generation: GenerationContext | None = None) -> None:
        self._model, self.head = model, TargetHead(model)
        self._reference: dict[int, torch.Tensor] = {}

    def loss_units(self, of: StepPlan | Batch) -> int:
        return of.samples

    def prepare_step(
        self, module: torch.nn.Module, batches: Sequence[Batch], device: torch.device, step: int = 0
    ) -> None:
        with adapter_off(self._model):
            self._reference = {batch.index: self._likelihoods(module, batch, device) for batch in batches}

    def loss(self, module: torch.nn.Module, batch: Batch, device: torch.device) -> LossOutput:
        section = self.recipe.dpo
        gained = self._likelihoods(module, batch, device) - self._reference[batch.index]
        rewards = section.beta * gained
        chosen, rejected = rewards[: batch.pairs], rewards[batch.pairs :]
        difference, noise = chosen - rejected, section.label_smoothing
        loss = -(1 - noise) * logsigmoid(difference) - noise * logsigmoid(-difference)
        loss = weighted(loss, batch.sources, self.recipe, training=module.training)
        return LossOutput(loss.sum(), pair_sums(chosen, rejected))

    def metrics(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        return evaluated(sums)

    def step_metrics(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        return pair_metrics(sums)

    def _likelihoods(self, module: torch.nn.Module, batch: Batch, device: torch.device) -> torch.Tensor:
        """Returns the log-likelihoods of the answers, [2 pairs]."""
        nll = self.head.losses(module, batch, device)
        rows = to_device(batch.targets.nonzero()[0], device)
        return torch.zeros(2 * batch.pairs, device=device).index_add(0, rows, -nll)
