"""The settings that belong to a single task. Those of preferences are in ``preference``, those of PPO in ``ppo``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from trainer.recipe.base import Section


class ClassificationSection(Section):
    """Settings of `task: classification`."""

    class_weights: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Weight of a sample's loss by its label, 1 for labels that are not named: `{spam: 4}` compensates for rare spam.
    The loss is still divided by the number of samples, so larger weights also make larger steps."""

    average: Literal["macro", "micro"] = "macro"
    """How F1, precision and recall of the labels are averaged: `macro` is their unweighted mean, in which a rare label
    counts as much as a frequent one; `micro` counts over all samples, which for one label per sample is accuracy."""
