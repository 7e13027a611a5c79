"""Classification of a text or a pair of texts: cross entropy of the head's outputs, one per label.

    loss = 1/N Σ_i w(y_i) · -log softmax(z_i)[y_i]

over the N samples of a step, with the weight w of each label (1 unless the recipe sets it).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy

from trainer.tasks.base import GenerationContext, LossOutput, Task, ratio
from trainer.tasks.inputs import to_device
from trainer.tasks.sequences import SequenceOutputs
from trainer.tasks.source_weights import weighted

if TYPE_CHECKING:
    from trainer.data import Batch, StepPlan
    from trainer.recipe import Recipe


class Classification(Task):
    def __init__(self, recipe: Recipe, labels: tuple[str, ...] = ()) -> None:
        super().__init__(recipe, labels)
        self.labels = labels
        given = recipe.classification.class_weights
        self._weights = torch.tensor([given.get(label, 1.0) for label in labels]) if given else None

    def attach(self, model: torch.nn.Module, generation: GenerationContext | None = None) -> None:
        self._outputs = SequenceOutputs(model)

    def loss_units(self, of: StepPlan | Batch) -> int:
        return of.samples

    def loss(self, module: torch.nn.Module, batch: Batch, device: torch.device) -> LossOutput:
        labels = to_device(batch.labels, device)
        logits = self._outputs.of(module, batch, device)[: len(labels)].float()
        weights = None if self._weights is None else self._weights.to(device)
        loss = cross_entropy(logits, labels, weight=weights, reduction="none")
        loss = weighted(loss, batch.sources, self.recipe, training=module.training).sum()
        return LossOutput(loss, counts(logits.detach().argmax(-1), labels, logits.shape[1]))

    def metrics(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        average = averages(sums, self.recipe.classification.average)
        return {"loss": ratio(sums, "loss"), **self.step_metrics(sums), **average}

    def step_metrics(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        return {"accuracy": float(sums["right"].sum()) / max(1.0, float(sums["actual"].sum()))}


def counts(predicted: torch.Tensor, actual: torch.Tensor, labels: int) -> dict[str, torch.Tensor]:
    """Counts, for each label, how often it is predicted, how often it is the actual one, and how often both. Each
    tensor has the shape [labels]."""
    return {
        "right": torch.bincount(actual[predicted == actual], minlength=labels),
        "predicted": torch.bincount(predicted, minlength=labels),
        "actual": torch.bincount(actual, minlength=labels),
    }


def averages(sums: Mapping[str, torch.Tensor], average: str) -> dict[str, float]:
    """Returns precision, recall and F1, averaged over the labels that occur or are predicted at least once. A value
    without a denominator counts as 0."""
    right, predicted, actual = (sums[name].double() for name in ("right", "predicted", "actual"))
    if average == "micro":
        right, predicted, actual = (part.sum()[None] for part in (right, predicted, actual))
    there = (predicted + actual) > 0
    precision, recall = right / predicted.clamp(min=1), right / actual.clamp(min=1)
    f1 = 2 * right / (predicted + actual).clamp(min=1)
    named = {"f1": f1, "precision": precision, "recall": recall}
    return {name: float(values[there].mean()) if there.any() else 0.0 for name, values in named.items()}
