"""The adapter: what is trained on top of the frozen base."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from trainer.recipe.base import Listed, OneOf, Section, takes
from trainer.registry import METHODS


def _targets(value: str | tuple[str, ...]) -> str | tuple[str, ...]:
    if not value:
        raise ValueError("names no module; write all-linear, or the modules that get an adapter")
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(
                f"{value!r} is not a regular expression ({error}); to name one module write [{value}]"
            ) from None
    return value


class AdapterSection(Section):
    """What is trained: a small adapter on the frozen base, or with `method: none` the whole model."""

    method: Annotated[str, OneOf(METHODS)] = "lora"
    """`lora` adds a low-rank product to each target; `dora` trains its magnitude apart from its direction (closer
    to full fine-tuning at low rank, slower); `none` trains every parameter of the base and leaves a plain model."""

    rank: int = Field(default=16, ge=1)
    """Rank of the update of each target module. Trainable parameters and adapter size grow in proportion."""

    alpha: int = Field(default=32, ge=1)
    """The update is scaled by alpha / rank: doubling alpha acts much like doubling the adapter's learning rate."""

    dropout: float = Field(default=0.05, ge=0.0, lt=1.0)
    """Fraction of the adapter's input that is dropped while training. 0 for large data sets."""

    target_modules: Annotated[
        str | Listed[str],
        takes("all-linear, a regular expression, or a list of module names"),
        AfterValidator(_targets),
    ] = "all-linear"
    """Modules that get an adapter: `all-linear` (every linear layer but the output head), a list of name endings
    (`[q_proj, v_proj]`), or a regular expression over full module names. A name that matches nothing is an error."""

    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases that are trained too: none, all of the model's, or those of the targets."""
