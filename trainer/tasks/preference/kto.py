"""Kahneman-Tversky optimisation: answers that are good or bad by themselves, without pairs.

KTO (Ethayarajh et al. 2024, arXiv:2402.01306). With the reward R(y) = β log(π(y|x) / π_ref(y|x)), s the logistic
function, and the weights λ:

    loss = 1/N Σ_i λ_good (1 - s(R(y_i) - β z))    for a good answer
                   λ_bad  (1 - s(β z - R(y_i)))    for a bad one

z estimates the divergence KL(π | π_ref): the mean of log(π(y'|x) / π_ref(y'|x)) over the step's prompts x, each with an
answer y' to another prompt, and at least 0. It has no gradient. The other prompt is the next one in the prepared data,
so that z does not depend on the number of ranks, nor on the micro-batches. Evaluations take z = 0, so that they can be
compared with each other.

The reference is that of `trainer.tasks.preference.dpo`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from trainer.tasks.base import GenerationContext, LossOutput, Task, ratio
from trainer.tasks.inputs import to_device
from trainer.tasks.lm_head_loss import TargetHead
from trainer.tasks.preference.likelihoods import Answers
from trainer.tasks.preference.reference import Reference, to_store
from trainer.tasks.source_weights import weighted

if TYPE_CHECKING:
    from trainer.data import Batch, StepPlan


class KTO(Task):
    prepares_steps = True
    _kl = 0.0

    def attach(self, model: torch.nn.Module, generation: GenerationContext | None = None) -> None:
        self.head = TargetHead(model)
        self._reference = Reference(self.recipe, model)

    def loss_units(self, of: StepPlan | Batch) -> int:
        return of.samples

    def output_settings(self) -> dict[str, Any] | None:
        return {} if self.recipe.stores_outputs else None

    def outputs(self, module: torch.nn.Module, batch: Batch, device: torch.device) -> Mapping[str, Any]:
        return to_store(self._both(module, batch, device))

    def prepare_step(
        self, module: torch.nn.Module, batches: Sequence[Batch], device: torch.device, step: int = 0
    ) -> None:
        self._reference.prepare(batches, lambda batch: self._both(module, batch, device), device)
        self._kl = self._divergence(module, batches, device) if step else 0.0

    def _divergence(self, module: torch.nn.Module, batches: Sequence[Batch], device: torch.device) -> float:
        """Returns z. Collective."""
        moved = [self._unrelated(module, batch, device) - self._reference.of(batch)[1] for batch in batches]
        values: list[float] = torch.cat(moved).tolist()
        if self.world:
            values = [value for of_rank in self.world.all_gather(values) for value in of_rank]
        # fsum rounds once, so that the result does not depend on which rank has which values.
        return max(0.0, math.fsum(values) / max(1, len(values)))

    def loss(self, module: torch.nn.Module, batch: Batch, device: torch.device) -> LossOutput:
        section = self.recipe.kto
        rewards = section.beta * (self._likelihoods(module, batch, device) - self._reference.of(batch)[0])
        good = to_device(batch.desirable, device)
        weight = torch.where(good, section.desirable_weight, section.undesirable_weight)
        margin = torch.where(good, 1.0, -1.0) * (rewards - section.beta * self._kl)
        loss = weighted(weight * (1 - margin.sigmoid()), batch.sources, self.recipe, training=module.training)
        return LossOutput(loss.sum(), _sums(rewards.detach(), good))

    def metrics(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        return {"loss": ratio(sums, "loss"), **_rewards(sums)}

    def step_metrics(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        return {**_rewards(sums), "kl": self._kl}

    def _likelihoods(self, module: torch.nn.Module, batch: Batch, device: torch.device) -> torch.Tensor:
        return Answers.of(self.head, module, batch, device, batch.samples).log_likelihoods()

    def _unrelated(self, module: torch.nn.Module, batch: Batch, device: torch.device) -> torch.Tensor:
        return self._likelihoods(module, batch.unrelated or batch.empty(), device)

    def _both(self, module: torch.nn.Module, batch: Batch, device: torch.device) -> torch.Tensor:
        """Returns the log-likelihoods of the answers, and of those to other prompts [2, samples]."""
        return torch.stack([self._likelihoods(module, batch, device), self._unrelated(module, batch, device)])


def _sums(rewards: torch.Tensor, good: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "good": good.sum(),
        "bad": (~good).sum(),
        "chosen": rewards[good].sum(),
        "rejected": rewards[~good].sum(),
    }


def _rewards(sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Returns the mean rewards of good and bad answers, and their difference."""
    chosen, rejected = (
        float(sums[n]) / max(1.0, float(sums[of])) for n, of in (("chosen", "good"), ("rejected", "bad"))
    )
    return {"reward_chosen": chosen, "reward_rejected": rejected, "reward_margin": chosen - rejected}
