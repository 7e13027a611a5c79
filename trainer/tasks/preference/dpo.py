"""Direct preference optimisation: preferences without a reward model.

DPO (Rafailov et al. 2023, arXiv:2305.18290). The reward of an answer y to a prompt x is the change of its likelihood by
training, R(y) = β log(π(y|x) / π_ref(y|x)). The loss is the mean of one of `dpo_losses` over the pairs of a step, plus
`rpo_alpha` times the negative log-likelihood per token of the chosen answer (Pang et al. 2024, arXiv:2404.19733).

The reference is the model as it was before the first step. If that is the same model with its adapter switched off, its
likelihoods are computed before the losses of a step, without dropout; otherwise they were computed once, before the
first step, and are stored next to the prepared data (`trainer.data.outputs`). No second model is in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from trainer.recipe.dpo_losses import DPO_LOSSES
from trainer.tasks.base import GenerationContext, LossOutput, Task
from trainer.tasks.inputs import to_device
from trainer.tasks.lm_head_loss import TargetHead
from trainer.tasks.preference.dpo_losses import LogRatios
from trainer.tasks.preference.likelihoods import Answers, shared_length_weights
from trainer.tasks.preference.pairs import evaluated, pair_metrics, pair_sums
from trainer.tasks.preference.reference import Reference, to_store
from trainer.tasks.source_weights import weighted

if TYPE_CHECKING:
    from trainer.data import Batch, StepPlan


class DPO(Task):
    prepares_steps = True

    def attach(self, model: torch.nn.Module, generation: GenerationContext | None = None) -> None:
        self.head = TargetHead(model)
        self._reference = Reference(self.recipe, model)
        self._loss = DPO_LOSSES.load(self.recipe.dpo.loss)

    def loss_units(self, of: StepPlan | Batch) -> int:
        return of.samples

    def output_settings(self) -> dict[str, Any] | None:
        return {"ld_alpha": self.recipe.dpo.ld_alpha} if self.recipe.stores_outputs else None

    def outputs(self, module: torch.nn.Module, batch: Batch, device: torch.device) -> Mapping[str, Any]:
        return to_store(self._likelihoods(self._answers(module, batch, device), batch))

    def prepare_step(
        self, module: torch.nn.Module, batches: Sequence[Batch], device: torch.device, step: int = 0
    ) -> None:
        def compute(batch: Batch) -> torch.Tensor:
            return self._likelihoods(self._answers(module, batch, device), batch)

        self._reference.prepare(batches, compute, device)

    def loss(self, module: torch.nn.Module, batch: Batch, device: torch.device) -> LossOutput:
        section, answers = self.recipe.dpo, self._answers(module, batch, device)
        gained = self._likelihoods(answers, batch) - self._reference.of(batch)
        tokens = answers.tokens.view(2, -1)
        loss = self._loss(LogRatios(*gained, *tokens), section)
        if section.rpo_alpha:
            loss = loss - section.rpo_alpha * answers.log_likelihoods().view(2, -1)[0] / tokens[0]
        loss = weighted(loss, batch.sources, self.recipe, training=module.training)
        return LossOutput(loss.sum(), pair_sums(*(section.beta * gained)))

    def metrics(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        return evaluated(sums)

    def step_metrics(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        return pair_metrics(sums)

    def _answers(self, module: torch.nn.Module, batch: Batch, device: torch.device) -> Answers:
        return Answers.of(self.head, module, batch, device, 2 * batch.pairs)

    def _likelihoods(self, answers: Answers, batch: Batch) -> torch.Tensor:
        """Returns the log-likelihoods of the chosen and of the rejected answers [2, pairs]."""
        alpha, weights = self.recipe.dpo.ld_alpha, None
        if alpha is not None:
            weights = to_device(shared_length_weights(batch.targets, batch.pairs, alpha), answers.nll_T.device)
        return answers.log_likelihoods(weights).view(2, -1)
