"""The tasks: the model class that each one needs, and the settings that belong to a single task."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from trainer.recipe.base import Section
from trainer.recipe.sections.ppo import PPOSection

CAUSAL, SEQUENCE = "AutoModelForCausalLM", "AutoModelForSequenceClassification"

PEFT_TYPES = {CAUSAL: "CAUSAL_LM", SEQUENCE: "SEQ_CLS"}
"""peft's task type for each class."""


class ClassificationSection(Section):
    """Settings of `task: classification`."""

    class_weights: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Weight of a sample's loss by its label, 1 for labels that are not named: `{spam: 4}` compensates for rare spam.
    The loss is still divided by the number of samples, so larger weights also make larger steps."""

    average: Literal["macro", "micro"] = "macro"
    """How F1, precision and recall of the labels are averaged: `macro` is their unweighted mean, in which a rare label
    counts as much as a frequent one; `micro` counts over all samples, which for one label per sample is accuracy."""


class DPOSection(Section):
    """Settings of `task: dpo`."""

    beta: float = Field(default=0.1, gt=0)
    """Strength of the link to the reference: the reward of an answer is beta times the amount that training has added
    to its log-likelihood. The paper has 0.1; smaller values let the model move further from the reference."""

    label_smoothing: float = Field(default=0.0, ge=0.0, lt=0.5)
    """Fraction of the preferences that are assumed to be swapped. Above 0, the loss no longer rewards ever larger
    margins."""


class TaskFacts(NamedTuple):
    """What the recipe's rules and the commands must know of a task without importing it.

    ``learns_from``: the kinds of samples (`trainer.recipe.sections.data.FormatFacts.gives`). ``auto_class``: the
    transformers class of the model; a sequence classifier has its own head, which is trained and saved with any
    adapter. ``has_reference``: compares with a reference, which is the same model with its adapter switched off.
    ``segments``: its forward pass gets the start of each sample and needs no mask. ``generates``: most of a step is
    text generation, which no formula of the MFU counts. ``section``: its settings; their key in the recipe is the
    task's name."""

    learns_from: tuple[str, ...]
    auto_class: str = CAUSAL
    has_reference: bool = False
    segments: bool = False
    generates: bool = False
    section: type[Section] | None = None


TASK_FACTS: dict[str, TaskFacts] = {
    "sft": TaskFacts(("prompted", "text"), segments=True),
    "classification": TaskFacts(("label",), SEQUENCE, section=ClassificationSection),
    "reward": TaskFacts(("preference",), SEQUENCE),
    "dpo": TaskFacts(("preference",), has_reference=True, segments=True, section=DPOSection),
    "ppo": TaskFacts(("prompted", "preference"), has_reference=True, generates=True, section=PPOSection),
}


def facts_of_task(task: str) -> TaskFacts:
    """Returns the task's row; for an unknown task, that of a causal language model that learns from nothing."""
    return TASK_FACTS.get(task, TaskFacts(()))
