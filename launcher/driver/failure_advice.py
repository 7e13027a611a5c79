"""Advice after a failure (`trainer.run.symptoms`), with the plan's suggestions if a GPU was full."""

from __future__ import annotations

import logging

from trainer.recipe import Recipe
from trainer.run import symptoms
from trainer.run.failure import Failure

log = logging.getLogger(__name__)

SUGGESTED = 3


def advise(cause: Failure, recipe: Recipe, run: str) -> str:
    """Lines for a person; empty for what explains itself. Planning may take seconds."""
    return symptoms.advise(cause, recipe, run, _fitting)


def _fitting(recipe: Recipe, device: int) -> list[str]:
    """Overrides under which the plan fits the device; none where the plan cannot be made, or fits as it is."""
    from launcher.plan.estimate import make

    try:
        found = make(recipe, device, None, None, None)
    except Exception:  # a failed run is told about even where it cannot be planned
        log.debug("the failed run could not be planned", exc_info=True)
        return []
    return [" ".join(suggestion.overrides) for suggestion in found.suggestions[:SUGGESTED]]
