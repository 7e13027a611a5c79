"""The runs of a recipe with `adapters`: each is the recipe with a few other settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.errors import Mistake, RecipeError
from trainer.recipe.loading import parse
from trainer.recipe.root import Recipe
from trainer.recipe.rules.together import check_together
from trainer.recipe.sweeps.trials import as_override

KEY = "adapters"


def variants(data: Mapping[str, Any]) -> list[Recipe]:
    """Returns the recipe of each run, in the order of `adapters`. ``data``: the recipe as the user gave it, since
    defaults depend on other settings. Raises RecipeError with the mistakes of all of them."""
    given, rest = data[KEY], {key: value for key, value in data.items() if key != KEY}
    found: list[Recipe] = []
    mistakes: list[Mistake] = []
    for name, changes in given.items():
        overrides = [as_override(key, value) for key, value in changes.items()]
        try:
            found.append(parse({**rest, "name": f"{data['name']}-{name}"}, overrides))
        except RecipeError as error:
            mistakes += [Mistake(f"{KEY}.{name}", mistake.path, mistake.message) for mistake in error.mistakes]
    if mistakes:
        raise RecipeError(tuple(mistakes))
    check_together(found)
    return found
