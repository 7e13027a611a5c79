"""The recipe: one strict model of everything that decides a run, checked without torch or Ray."""

from __future__ import annotations

from trainer.recipe.adapter import AdapterSection
from trainer.recipe.checkpoint import CheckpointSection
from trainer.recipe.data import DataSection, SourceSection
from trainer.recipe.loading import load, loads, parse
from trainer.recipe.model import ModelSection
from trainer.recipe.optimizer import OptimizerSection
from trainer.recipe.resources import ResourcesSection
from trainer.recipe.root import Recipe
from trainer.recipe.schedule import ScheduleSection
from trainer.recipe.strategy import StrategySection
from trainer.recipe.training import TrainingSection
from trainer.recipe.writing import differences, dump, fingerprint, schema

__all__ = [
    "AdapterSection",
    "CheckpointSection",
    "DataSection",
    "ModelSection",
    "OptimizerSection",
    "Recipe",
    "ResourcesSection",
    "ScheduleSection",
    "SourceSection",
    "StrategySection",
    "TrainingSection",
    "differences",
    "dump",
    "fingerprint",
    "load",
    "loads",
    "parse",
    "schema",
]
