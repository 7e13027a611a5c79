"""The plan of a run: each rank's memory, computed from the base's configuration before anything is started."""

from trainer.plan.config import Base, read_base
from trainer.plan.memory import Planner
from trainer.plan.result import Limits, Plan, RankPlan
from trainer.plan.run_length import RunLength, RunLengthQuery
from trainer.plan.suggestions import Suggestion, suggestions

__all__ = [
    "Base",
    "Limits",
    "Plan",
    "Planner",
    "RankPlan",
    "RunLength",
    "RunLengthQuery",
    "Suggestion",
    "read_base",
    "suggestions",
]
