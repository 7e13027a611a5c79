"""A worker's assignment. Cheap to import: the driver makes one before it needs torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer.errors import InputError
from trainer.recipe import Recipe, plugins
from trainer.recipe.base import STORED


@dataclass(frozen=True)
class Job:
    """``recipe``: this attempt's; its resources and strategy may differ from the frozen one. ``holder``: the driver's
    host and process, for the attempt's claim. ``spent``: seconds of the start-up phases so far
    (`trainer.run.startup_phases`), up to ``asked_at``, when the driver asked for the workers (Unix s, by its clock).
    ``others``: runs that are trained in the same processes on the same base model (`trainer.worker.together`)."""

    storage: str
    driver: int
    recipe: Recipe
    total_steps: int
    holder: Mapping[str, Any]
    spent: Mapping[str, float] = field(default_factory=dict)
    asked_at: float | None = None
    others: tuple[Job, ...] = ()

    @property
    def runs(self) -> tuple[Job, ...]:
        """The jobs of all runs that are trained in the same processes."""
        return (self, *self.others)

    def packed(self) -> dict[str, Any]:
        """Returns plain values: the recipe may hold classes of plug-ins, which a process has to import first."""
        others = [other.packed() for other in self.others]
        return {**vars(self), "recipe": self.recipe.model_dump(mode="json"), "others": others}

    @staticmethod
    def unpacked(values: dict[str, Any]) -> Job:
        """Imports the plug-ins that the recipe names. Raises an exception of any type if one is missing."""
        for _, mistake in plugins.use(values["recipe"], imports=True):
            raise InputError(mistake)
        recipe = Recipe.model_validate(values["recipe"], context={STORED: True})
        return Job(**{**values, "recipe": recipe, "others": tuple(map(Job.unpacked, values["others"]))})
