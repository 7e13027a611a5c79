"""Checkpoints."""

from __future__ import annotations

from pydantic import Field

from trainer.recipe.base import Section


class CheckpointSection(Section):
    """When checkpoints are committed, and how many stay."""

    every_steps: int = Field(default=100, ge=1)
    """Steps between checkpoints; the last step always gets one. A failure loses the steps since the newest one."""

    keep_last: int = Field(default=3, ge=1)
    """Committed checkpoints that are kept; older ones are deleted after a newer one is committed."""
