"""The metrics of generated answers."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.registry import Choice, Registry


@dataclass(frozen=True)
class GenerativeMetricRow(Choice):
    """A metric's row. ``code``: a function of a generated answer and the accepted answers, which returns scores by
    name. ``scores``: the names that it may return, the main one first. Higher is better."""

    scores: tuple[str, ...]


GENERATIVE_METRICS = Registry(
    "metric of generated answers",
    {
        "auto": GenerativeMetricRow("trainer.tasks.answers:suggested", ("exact_match", "f1", "accuracy")),
        "exact_match": GenerativeMetricRow("trainer.tasks.answers:matches", ("exact_match", "f1")),
        "number": GenerativeMetricRow("trainer.tasks.answers:final_numbers", ("accuracy",)),
    },
)

FUNCTION_SCORES = ("score",)
"""The scores of a function that the recipe names."""

ANSWER_SCORES = (*dict.fromkeys(name for _, row in GENERATIVE_METRICS.items() for name in row.scores), *FUNCTION_SCORES)
"""The scores of all metrics."""


def scores_of(metric: str) -> tuple[str, ...]:
    """Returns the names of a metric's scores. ``metric``: a name, or a function as ``package.module:function``."""
    row = GENERATIVE_METRICS.get(metric)
    return FUNCTION_SCORES if row is None else row.scores
