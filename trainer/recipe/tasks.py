"""The tasks: the samples that each one learns from and the model class that it needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from trainer.recipe.base import Section
from trainer.recipe.sections.preference import DPOSection, KTOSection, ORPOSection, SimPOSection
from trainer.recipe.sections.rollouts.grpo import GRPOSection
from trainer.recipe.sections.rollouts.ppo import PPOSection
from trainer.recipe.sections.tasks import ClassificationSection, DistillSection, SFTSection
from trainer.registry import Choice, Registry

if TYPE_CHECKING:
    from trainer.recipe.root import Recipe

Better = Literal["min", "max"]
"""The direction in which a metric is better: lower or higher."""
PREFIX = "eval_"
"""Prefix of the metrics of an evaluation."""

CAUSAL, SEQUENCE = "AutoModelForCausalLM", "AutoModelForSequenceClassification"

PEFT_TYPES = {CAUSAL: "CAUSAL_LM", SEQUENCE: "SEQ_CLS"}
"""peft's task type for each class."""


@dataclass(frozen=True)
class TaskRow(Choice):
    """A task's row.

    ``learns_from``: the kinds of samples (`trainer.recipe.formats.FormatRow.gives`). ``auto_class``: the transformers
    class of the model; a sequence classifier has its own head, which is trained and saved with any adapter.
    ``has_reference``: compares with a reference, the model as it was before the first step. ``stores_reference``: what
    it needs of the reference can be computed before the first step and stored, since it learns from the data's own
    texts; otherwise the reference has to be the model with its adapter switched off. ``unpairs``: a pair of answers is
    two samples. ``margins``: its loss reads a pair's margin. ``extra_forwards``: forwards without gradients of a
    step's tokens, besides those of the reference, which runs one more. ``segments``: its forward pass gets the start of
    each sample and needs no mask. ``router_loss``: its loss may add the balance of a mixture's experts.
    ``divides_texts``: its loss can be computed by ranks that each have a part of the tokens. ``generates``: it learns
    from texts that the model generates for the samples' prompts; that is most of a step, and no formula of the MFU
    counts it. ``has_teacher``: compares with the distributions of another model, the teacher. ``evaluates``: the
    metrics of `trainer.tasks.Task.metrics` by which two models can be compared, each with its better direction.
    ``section``: its settings; their key in the recipe is the task's name (of a row that is named as
    ``package.module:ROW``, `row`)."""

    learns_from: tuple[str, ...]
    auto_class: str = CAUSAL
    has_reference: bool = False
    stores_reference: bool = False
    unpairs: bool = False
    margins: bool = False
    extra_forwards: int = 0
    segments: bool = False
    router_loss: bool = False
    divides_texts: bool = False
    generates: bool = False
    has_teacher: bool = False
    evaluates: Mapping[str, Better] = field(default_factory=lambda: {"loss": "min"})
    section: type[Section] | None = None

    @property
    def of_pairs(self) -> bool:
        """True if its samples are pairs of answers."""
        return self.learns_from == ("preference",)

    @property
    def takes_several(self) -> bool:
        """True if runs can share the model that is trained: it learns with the base model's own head, from the data."""
        return not (self.has_head or self.generates or self.has_teacher)

    @property
    def has_head(self) -> bool:
        """True if the model has a head of its own in place of the one that predicts tokens; it writes no texts."""
        return self.auto_class == SEQUENCE


OF_PAIRS: Mapping[str, Better] = {"loss": "min", "pair_accuracy": "max", "reward_margin": "max"}
PREFERENCE: dict[str, Any] = {
    "learns_from": ("preference",),
    "segments": True,
    "divides_texts": True,
    "evaluates": OF_PAIRS,
}
"""The facts that the tasks share which compare the likelihoods of two answers."""

TASKS = Registry(
    "task",
    {
        "sft": TaskRow(
            "trainer.tasks.sft:SFT",
            ("prompted", "text"),
            segments=True,
            router_loss=True,
            divides_texts=True,
            evaluates={"loss": "min", "perplexity": "min"},
            section=SFTSection,
        ),
        "classification": TaskRow(
            "trainer.tasks.classification:Classification",
            ("label",),
            SEQUENCE,
            evaluates={"loss": "min", "accuracy": "max", "f1": "max", "precision": "max", "recall": "max"},
            section=ClassificationSection,
        ),
        "reward": TaskRow(
            "trainer.tasks.reward:Reward",
            ("preference",),
            SEQUENCE,
            margins=True,
            divides_texts=True,
            evaluates=OF_PAIRS,
        ),
        "dpo": TaskRow(
            "trainer.tasks.preference.dpo:DPO",
            **PREFERENCE,
            has_reference=True,
            stores_reference=True,
            section=DPOSection,
        ),
        "kto": TaskRow(
            "trainer.tasks.preference.kto:KTO",
            ("rated", "preference"),
            has_reference=True,
            stores_reference=True,
            unpairs=True,
            extra_forwards=1,
            segments=True,
            divides_texts=True,
            evaluates={"loss": "min", "reward_margin": "max"},
            section=KTOSection,
        ),
        "orpo": TaskRow("trainer.tasks.preference.orpo:ORPO", **PREFERENCE, section=ORPOSection),
        "simpo": TaskRow("trainer.tasks.preference.simpo:SimPO", **PREFERENCE, section=SimPOSection),
        "ppo": TaskRow(
            "trainer.tasks.ppo.task:PPO",
            ("prompted", "preference"),
            has_reference=True,
            generates=True,
            evaluates={"loss": "min", "reward": "max"},
            section=PPOSection,
        ),
        "grpo": TaskRow(
            "trainer.tasks.grpo.task:GRPO",
            ("prompted", "preference"),
            generates=True,
            evaluates={"loss": "min", "reward": "max", "pass_at_1": "max", "pass_at_k": "max"},
            section=GRPOSection,
        ),
        "distill": TaskRow(
            "trainer.tasks.distill.task:Distill",
            ("prompted", "text"),
            segments=True,
            has_teacher=True,
            evaluates={"loss": "min", "perplexity": "min", "agreement": "max"},
            section=DistillSection,
        ),
    },
    group="muster.tasks",
    held=TaskRow("", ("prompted", "text", "preference", "rated", "label")),
)


def compared_metrics(recipe: Recipe) -> dict[str, Better]:
    """Returns the metrics of the recipe's evaluations that have a better direction, by their names in
    `trainer.run.metrics.EvalMetrics`: those of the task, and those of generated answers."""
    of_task = {f"{PREFIX}{name}": better for name, better in TASKS[recipe.task].evaluates.items()}
    return {**of_task, **recipe.generative_eval.metrics}
