"""Checkpoints."""

from __future__ import annotations

from pydantic import Field

from trainer.recipe.base import Section


class CheckpointSection(Section):
    """The checkpoints: when they are committed, how many are kept, how old the newest may be before a warning."""

    every_steps: int = Field(default=100, ge=1)
    """Steps between checkpoints; the last step always gets one. A failure loses the steps since the newest one."""

    keep_last: int = Field(default=3, ge=1)
    """Committed checkpoints that are kept; older ones are deleted after a newer one is committed."""

    keep_for_hours: float | None = Field(default=None, gt=0)
    """Hours for which every committed checkpoint is kept, beyond those of `keep_last`; null keeps only those. A
    checkpoint is deleted when it is neither among the newest `keep_last` nor younger than this."""

    max_age_s: float = Field(default=3600.0, gt=0)
    """Seconds since the newest commit after which a running attempt warns (event `stale_checkpoint`): a failure would
    lose that much work. Training continues."""

    keep_best: str | None = Field(default=None, examples=["eval_loss"])
    """Metric of the evaluations that chooses the final adapter: that of the best evaluation and not that of the last
    step. Each evaluation that is the best so far gets a checkpoint, which is kept until there is a better one. Of equal
    values the earlier one counts. Needs `training.eval_every`. See
    [concepts.md](concepts.md#the-best-checkpoint-and-early-stopping)."""

    @property
    def keep_for_s(self) -> float | None:
        return None if self.keep_for_hours is None else self.keep_for_hours * 3600.0
