"""The tasks: the samples that each one learns from and the model class that it needs."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.recipe.base import Section
from trainer.recipe.sections.ppo import PPOSection
from trainer.recipe.sections.tasks import ClassificationSection, DPOSection, ORPOSection, SFTSection, SimPOSection
from trainer.registry import Choice, Registry

CAUSAL, SEQUENCE = "AutoModelForCausalLM", "AutoModelForSequenceClassification"

PEFT_TYPES = {CAUSAL: "CAUSAL_LM", SEQUENCE: "SEQ_CLS"}
"""peft's task type for each class."""


@dataclass(frozen=True)
class TaskRow(Choice):
    """A task's row.

    ``learns_from``: the kinds of samples (`trainer.recipe.formats.FormatRow.gives`). ``auto_class``: the transformers
    class of the model; a sequence classifier has its own head, which is trained and saved with any adapter.
    ``has_reference``: compares with a reference, which is the same model with its adapter switched off. ``segments``:
    its forward pass gets the start of each sample and needs no mask. ``router_loss``: its loss may add the balance of a
    mixture's experts. ``margins``: its loss reads the margins of preferences. ``divides_texts``: its loss can be
    computed by ranks that each have a part of the tokens.
    ``generates``: it learns from texts that the model generates for the samples' prompts; that is most of a step, and
    no formula of the MFU counts it. ``section``: its settings; their key in the recipe is the task's name."""

    learns_from: tuple[str, ...]
    auto_class: str = CAUSAL
    has_reference: bool = False
    segments: bool = False
    router_loss: bool = False
    margins: bool = False
    divides_texts: bool = False
    generates: bool = False
    section: type[Section] | None = None

    @property
    def has_head(self) -> bool:
        """True if the model has a head of its own in place of the one that predicts tokens; it writes no texts."""
        return self.auto_class == SEQUENCE


TASKS = Registry(
    "task",
    {
        "sft": TaskRow(
            "trainer.tasks.sft:SFT",
            ("prompted", "text"),
            segments=True,
            router_loss=True,
            divides_texts=True,
            section=SFTSection,
        ),
        "classification": TaskRow(
            "trainer.tasks.classification:Classification", ("label",), SEQUENCE, section=ClassificationSection
        ),
        "reward": TaskRow("trainer.tasks.reward:Reward", ("preference",), SEQUENCE, margins=True, divides_texts=True),
        "dpo": TaskRow(
            "trainer.tasks.dpo:DPO",
            ("preference",),
            has_reference=True,
            segments=True,
            divides_texts=True,
            section=DPOSection,
        ),
        "orpo": TaskRow(
            "trainer.tasks.orpo:ORPO", ("preference",), segments=True, divides_texts=True, section=ORPOSection
        ),
        "simpo": TaskRow(
            "trainer.tasks.simpo:SimPO", ("preference",), segments=True, divides_texts=True, section=SimPOSection
        ),
        "ppo": TaskRow(
            "trainer.tasks.ppo.task:PPO",
            ("prompted", "preference"),
            has_reference=True,
            generates=True,
            section=PPOSection,
        ),
    },
)
