"""The tasks: what each asks of the model, and the settings that belong to one of them alone."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from trainer.recipe.base import Section
from trainer.recipe.sections.ppo import PPOSection

CAUSAL, SEQUENCE = "AutoModelForCausalLM", "AutoModelForSequenceClassification"

AUTO_CLASSES: dict[str, str] = {
    "sft": CAUSAL,
    "classification": SEQUENCE,
    "reward": SEQUENCE,
    "dpo": CAUSAL,
    "ppo": CAUSAL,
}
"""The class of transformers that each task's model is loaded by. A sequence classifier has a head of its own, which is
trained and saved with any adapter."""

REFERRING = ("dpo", "ppo")
"""Tasks that compare with a reference: the same model with its adapter switched off."""

PEFT_TYPES = {CAUSAL: "CAUSAL_LM", SEQUENCE: "SEQ_CLS"}
"""peft's name for what such a model does."""


class ClassificationSection(Section):
    """Of `task: classification`."""

    class_weights: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Weight of a sample's loss by its label, 1 for labels that are not named: `{spam: 4}` makes up for rare spam. The
    loss is divided by the number of samples all the same, so that larger weights also make larger steps."""

    average: Literal["macro", "micro"] = "macro"
    """How F1, precision and recall come from those of the labels: `macro` is their plain mean, in which a rare label
    counts as much as a frequent one; `micro` counts over all samples, which for one label per sample is accuracy."""


class DPOSection(Section):
    """Of `task: dpo`."""

    beta: float = Field(default=0.1, gt=0)
    """How closely the model is held to the reference: the reward of an answer is beta times what training has added to
    its log-likelihood. 0.1 is the paper's; smaller values let the model go further."""

    label_smoothing: float = Field(default=0.0, ge=0.0, lt=0.5)
    """Share of the preferences that are taken to be the wrong way round. Above 0, the loss stops asking for ever larger
    margins."""


TASK_SECTIONS: dict[str, type[Section]] = {
    "classification": ClassificationSection,
    "dpo": DPOSection,
    "ppo": PPOSection,
}
"""The section of each task that has settings; it stands in the recipe under the task's name."""
