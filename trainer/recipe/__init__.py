"""The recipe: one strict model of everything that decides a run, checked without torch or Ray."""

from __future__ import annotations

from trainer.recipe.loading import load, loads, parse
from trainer.recipe.root import Recipe
from trainer.recipe.sections.adapter import AdapterSection
from trainer.recipe.sections.checkpoint import CheckpointSection
from trainer.recipe.sections.data import DataSection, SourceSection
from trainer.recipe.sections.model import ModelSection
from trainer.recipe.sections.optimizer import OptimizerSection
from trainer.recipe.sections.resources import ResourcesSection
from trainer.recipe.sections.schedule import ScheduleSection
from trainer.recipe.sections.strategy import StrategySection
from trainer.recipe.sections.training import TrainingSection
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
