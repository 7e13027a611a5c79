"""The strategy."""

from __future__ import annotations

from typing import Annotated

from trainer.recipe.base import OneOf, Section
from trainer.registry import STRATEGIES


class StrategySection(Section):
    """How the model is spread over the workers."""

    kind: Annotated[str, OneOf(STRATEGIES)] = "ddp"
    """`ddp` keeps the whole model on each worker and is fastest when it fits; `fsdp` gives each worker a slice of every
    layer (FSDP2), so that memory per worker falls with their number."""
