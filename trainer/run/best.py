"""The comparison of a run's evaluations: which one is the best, and when the run ends early. Pure functions.

Their results are in the state of each commit record, so that they survive an interruption and do not depend on the
workers. A value that is not finite is never an improvement.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from trainer.recipe import TrainingSection
from trainer.recipe.sections.training import EarlyStopSection
from trainer.recipe.tasks import Better
from trainer.records import Count, read_record
from trainer.run.metrics import EvalMetrics

BEST, EARLY_STOP, ENDED_EARLY = "best", "early_stop", "ended_early"
"""Keys in the state of a commit record: `Best`, `Patience`, and true for the last step of a run that ended early."""

State = Mapping[str, Any]


@dataclass(frozen=True)
class Best:
    """The best evaluation so far. ``attempt``: of the commit that has its weights."""

    metric: str
    value: float
    step: Count
    attempt: Count


@dataclass(frozen=True)
class Patience:
    """The last improvement by `training.early_stop`, and the number of evaluations without one since. ``value`` and
    ``step`` are None before the first finite value."""

    metric: str
    value: float | None = None
    step: Count | None = None
    evaluations: Count = 0

    def __str__(self) -> str:
        """Returns why a run ends early, as a clause."""
        best = f"; it was {self.value:.4f} after step {self.step}" if self.value is not None else ""
        return f"{self.metric} has not improved in {self.evaluations} evaluation{'s'[: self.evaluations > 1]}{best}"


def value_of(metrics: EvalMetrics, metric: str) -> float | None:
    """Returns the value of a metric by its name in `trainer.recipe.tasks.compared_metrics`; None if it is not there or
    not finite."""
    value = metrics.eval_loss if metric == "eval_loss" else metrics.task.get(metric)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def improves(value: float | None, before: float | None, better: Better, by: float = 0.0) -> bool:
    """Returns True if ``value`` is better than ``before`` by more than ``by``. Equal values are no improvement."""
    if value is None or before is None:
        return value is not None
    return (before - value if better == "min" else value - before) > by


def better_of(before: Best | None, now: Best | None, better: Better) -> Best | None:
    """Returns the better one; of equal values the earlier one, and ``now`` if ``before`` is of another metric."""
    if now is None or before is None or before.metric != now.metric:
        return now or before
    return now if improves(now.value, before.value, better) else before


def waited(before: Patience, value: float | None, step: int, better: Better, min_delta: float) -> Patience:
    """Returns the count after an evaluation."""
    if improves(value, before.value, better, min_delta):
        return Patience(before.metric, value, step)
    return replace(before, evaluations=before.evaluations + 1)


def is_over(patience: Patience | None, section: EarlyStopSection | None) -> bool:
    """Returns True if the run ends by ``section``, which may not be the one that it was counted with."""
    if patience is None or section is None or patience.metric != section.metric:
        return False
    return patience.evaluations >= section.patience


def read_best(state: State) -> Best | None:
    """Reads it from a commit record. Raises Malformed."""
    return read_record(Best, state[BEST]) if state.get(BEST) is not None else None


def chosen_by(state: State) -> Best | None:
    """Returns the best evaluation if it is that of the commit record itself."""
    best = read_best(state)
    return best if best and best.step == state.get("facts", {}).get("step") else None


def read_patience(state: State) -> Patience | None:
    """Reads it from a commit record. Raises Malformed."""
    return read_record(Patience, state[EARLY_STOP]) if state.get(EARLY_STOP) is not None else None


def ended_early(state: State, length: TrainingSection | None = None) -> Patience | None:
    """Returns the count with which a run ended early; None if this is not the state of its last step. ``length``: of
    the recipe that the run is resumed with; it may allow more evaluations, or all steps."""
    patience = read_patience(state) if state.get(ENDED_EARLY) else None
    return patience if patience and (length is None or is_over(patience, length.early_stop)) else None


def to_state(best: Best | None, patience: Patience | None, *, over: bool) -> dict[str, Any]:
    """Returns the entries of a commit record's state; none for a run that compares no evaluations."""
    found = {BEST: best and asdict(best), EARLY_STOP: patience and asdict(patience), ENDED_EARLY: over or None}
    return {name: value for name, value in found.items() if value is not None}
