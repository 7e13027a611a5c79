"""The rows of `metrics/`: one per training step, and one per evaluation.

A field is None if it was not measured, was not written by the version that wrote the row, or is not finite, which JSON
cannot write. ``time`` is Unix s, 0 in rows of old versions; ``step`` counts optimizer steps from 1. ``task`` has the
task's own metrics by their stored names, and after reading also the fields that this version does not know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

from trainer.recipe.generative_metrics import ANSWER_SCORES
from trainer.records import Count, UnixTime
from trainer.run.rows import read_row, row_of

NOT_IN_FACTS = {
    *("attempt", "time", "stall_s", "backlog", "checkpoint_age_s", "compile_s"),
    *("slowest_rank", "slowest_rank_s", "mean_rank_s", "rank_s", "memory_bytes", "memory_rank"),
}
"""Fields that a commit record does not repeat: they describe the machines, not what was learned."""


@dataclass(frozen=True, kw_only=True)
class MetricsRow:
    """A row of either kind."""

    attempt: Count = 0
    time: UnixTime = 0.0
    step: Count

    @classmethod
    def from_row(cls, row: Any) -> Self:
        if not isinstance(row, dict):
            return read_row(cls, row)
        known = {one.name for one in fields(cls)}
        return read_row(cls, {**row, "task": {name: value for name, value in row.items() if name not in known}})

    def to_row(self) -> dict[str, Any]:
        row: dict[str, Any] = {}
        for name, value in row_of(self).items():
            row |= value if name == "task" else {name: value}
        return row

    def facts(self) -> dict[str, Any]:
        """Returns the fields that a commit record repeats."""
        return {name: value for name, value in self.to_row().items() if name not in NOT_IN_FACTS}


@dataclass(frozen=True, kw_only=True)
class StepMetrics(MetricsRow):
    """One optimizer step, of all ranks. `trainer.worker.loop` makes it after the step, and `trainer.worker.telemetry`
    adds the fields from ``stall_s`` to ``checkpoint_age_s`` and ``compile_s``; rank 0 writes it."""

    total_steps: Count | None
    """The last step of the run."""
    epoch: Count | None
    loss: float | None
    """Mean over the task's units of the step (target tokens, samples or pairs), over all ranks."""
    task: Mapping[str, Any] = field(default_factory=dict)
    lr: float | None
    grad_norm: float | None
    """Norm before clipping; the mean over the step's updates."""
    tokens: Count | None
    """Without padding, over all ranks; so are ``target_tokens``."""
    target_tokens: Count | None
    tokens_per_s: float | None
    tokens_per_s_per_worker: float | None
    step_s: float | None
    """Seconds from the wait for the step's data to the end of its update."""
    mfu: float | None = None
    """Share of the GPUs' peak that the model's own arithmetic uses; only if the peak is known."""
    hfu: float | None = None
    """Like ``mfu``, with what is computed again (gradient checkpointing)."""
    world_size: Count | None
    samples: Count | None
    """Samples that the run has trained on, in all attempts and epochs."""
    stall_s: float | None = None
    """Seconds for which checkpoints have blocked the loop since the row before."""
    backlog: Count | None = None
    """Snapshots that are not committed yet, at most 2."""
    checkpoint_age_s: float | None = None
    """Seconds since the newest commit, or since the attempt began."""
    slowest_rank: Count | None = None
    slowest_rank_s: float | None = None
    """The rank's own seconds in the step, without waiting for others (`trainer.worker.rank_timer`)."""
    mean_rank_s: float | None = None
    rank_s: list[float] | None = None
    """Each rank's own seconds; only with at most 64 ranks."""
    memory_bytes: Count | None = None
    """Memory of ``memory_rank``, the rank that uses most: on a GPU the peak so far, on a CPU the memory in use now."""
    memory_rank: Count | None = None
    compile_s: float | None = None
    """Seconds of the step that torch.compile took; only if it compiled."""

    @property
    def blocked_s(self) -> float:
        """Seconds for which checkpoints blocked the loop before it."""
        return self.stall_s or 0.0

    @property
    def seconds(self) -> float:
        """Seconds since the row before."""
        return self.blocked_s + (self.step_s or 0.0)


@dataclass(frozen=True, kw_only=True)
class EvalMetrics(MetricsRow):
    """One evaluation after ``step``. `trainer.worker.loop` makes it from all ranks, and rank 0 writes it. Other metrics
    than the loss are in ``task``, with the prefix ``eval_``."""

    eval_loss: float | None
    task: Mapping[str, Any] = field(default_factory=dict)
    eval_tokens: Count | None
    """Without padding, over all ranks; so are ``eval_target_tokens``."""
    eval_target_tokens: Count | None
    eval_s: float | None
    """Seconds that the evaluation took."""
    eval_answers: Count | None = None
    """Generated answers that were scored, over all ranks; only in an evaluation with answers. Their scores are in
    ``task``."""
    eval_answers_s: float | None = None
    """Seconds of the evaluation for its answers."""
    compile_s: float | None = None
    """Seconds of it that torch.compile took; only if it compiled."""

    @property
    def scores(self) -> dict[str, float]:
        """The scores of the generated answers, without their prefix; empty in an evaluation without answers."""
        known = {f"eval_{name}": name for name in ANSWER_SCORES} if self.eval_answers else {}
        return {known[name]: value for name, value in self.task.items() if name in known}

    @property
    def blocked_s(self) -> float:
        return 0.0

    @property
    def seconds(self) -> float:
        """Seconds since the row before."""
        return self.eval_s or 0.0


Metrics = StepMetrics | EvalMetrics


def read_metrics_row(row: Any) -> Metrics:
    """Returns a stored row: StepMetrics if it has a loss, which may be null, else EvalMetrics. Raises Malformed."""
    return (StepMetrics if isinstance(row, dict) and "loss" in row else EvalMetrics).from_row(row)
