"""The settings that belong to a single task. PPO's are in ``ppo``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from trainer.recipe.base import Section


class SFTSection(Section):
    """Settings of `task: sft`."""

    neftune_alpha: float | None = Field(default=None, gt=0.0)
    """NEFTune: noise on the input embeddings of training, drawn evenly from (-1, 1) times
    neftune_alpha / sqrt(tokens of the sample · hidden size). The paper has 5, 10 and 15; null adds none. See
    [tasks.md](tasks.md#sft)."""

    label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of each target that is given evenly to all tokens of the vocabulary in the loss of training. Evaluations
    are without it."""


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


class ORPOSection(Section):
    """Settings of `task: orpo`."""

    beta: float = Field(default=0.1, gt=0)
    """Factor of the odds ratio's loss, which is added to the negative log-likelihood of the chosen answer (λ in the
    paper)."""


class SimPOSection(Section):
    """Settings of `task: simpo`."""

    beta: float = Field(default=2.0, gt=0)
    """Factor of the reward: the reward of an answer is beta times the mean log-likelihood of its tokens."""

    gamma: float = Field(default=0.5, ge=0)
    """Margin by which the reward of the chosen answer is to exceed that of the rejected one, itself (not its ratio to
    beta). The paper has 0.3 to 1.6, with a beta of 2 to 2.5."""

    cpo_alpha: float = Field(default=0.0, ge=0)
    """Factor of the negative log-likelihood of the chosen answer, averaged over its tokens, that is added to the loss
    (CPO); 0 adds nothing."""

    label_smoothing: float = Field(default=0.0, ge=0.0, lt=0.5)
    """Fraction of the preferences that are assumed to be swapped."""
