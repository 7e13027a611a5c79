"""What to try next after a failure (`trainer.advice`), where the plan can be asked what would fit a full GPU."""

from __future__ import annotations

import logging

from trainer import advice
from trainer.failure import Cause
from trainer.recipe import Recipe

log = logging.getLogger(__name__)

SUGGESTED = 3


def advise(cause: Cause, recipe: Recipe, run: str) -> str:
    """Lines for a person; empty for what explains itself. Planning may take seconds."""
    return advice.advise(cause, recipe, run, _fitting)


def _fitting(recipe: Recipe, device: int) -> list[str]:
    """Overrides under which the plan fits the device; none where the plan cannot be made, or fits as it is."""
    from launcher.planning import make

    try:
        found = make(recipe, device, None, None, None)
    except Exception:  # a failed run is told about even where it cannot be planned
        log.debug("the failed run could not be planned", exc_info=True)
        return []
    return [" ".join(suggestion.overrides) for suggestion in found.suggestions[:SUGGESTED]]
