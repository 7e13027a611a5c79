"""Texts to look at."""

from __future__ import annotations

from pydantic import Field

from trainer.recipe.base import Section


class SamplesSection(Section):
    """Texts that the model writes before the first step and after the last one, to the same prompts: what training has
    changed. They stand in the run's events and in its report. Language models only; what is learned stays the same."""

    count: int = Field(default=4, ge=0)
    """Prompts at most; 0 writes none. They are what stands before the first answer of the first samples of `data.eval`,
    as many of those as fit, with their texts, into one micro-batch of training. Without `data.eval` there are none."""

    max_new_tokens: int = Field(default=48, ge=1)
    """Tokens of a text at most: each is a forward pass on every rank."""
