"""Sample texts, for a person to read."""

from __future__ import annotations

from pydantic import Field

from trainer.recipe.base import Section


class SamplesSection(Section):
    """Texts that the model writes for the same prompts before the first step and after the last one, to show what
    training has changed. They are stored in the run's events and in its report. Language models only; no effect on the
    result."""

    count: int = Field(default=4, ge=0)
    """Maximum number of prompts; 0 writes no texts. The prompts come from the first samples of `data.eval`, each up to
    its first answer; as many are taken as fit, with their texts, into one micro-batch of training. Without `data.eval`
    there are none."""

    max_new_tokens: int = Field(default=48, ge=1)
    """Maximum tokens of a text; each token is a forward pass on every rank."""
