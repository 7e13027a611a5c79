"""What a run will take, before anything is started: bytes per rank, from the base's configuration alone."""

from trainer.plan.config import Base, read_base
from trainer.plan.memory import plan_ranks
from trainer.plan.result import Limits, Plan, RankPlan

__all__ = ["Base", "Limits", "Plan", "RankPlan", "plan_ranks", "read_base"]
