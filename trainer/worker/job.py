"""A worker's assignment. Cheap to import: the driver makes one before it needs torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer.recipe import Recipe


@dataclass(frozen=True)
class Job:
    """``recipe``: this attempt's; its resources and strategy may differ from the frozen one. ``holder``: the driver's
    host and process, for the attempt's claim. ``spent``: seconds of the start-up phases so far
    (`trainer.run.startup_phases`), up to ``asked_at``, when the driver asked for the workers (Unix s, by its clock)."""

    storage: str
    driver: int
    recipe: Recipe
    total_steps: int
    holder: Mapping[str, Any]
    spent: Mapping[str, float] = field(default_factory=dict)
    asked_at: float | None = None
