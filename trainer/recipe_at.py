"""Recipes by their path or URL."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.errors import InputError
from trainer.recipe import Recipe, load, loads
from trainer.storage import open_storage

ENDINGS = (".yaml", ".yml", ".json")
DEADLINE_S = 30.0


def is_recipe(place: str) -> bool:
    """Whether this names a recipe rather than a run."""
    return place.endswith(ENDINGS)


def recipe_at(place: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from a file, or from an fsspec URL such as the one under which a submitted recipe was frozen. Raises
    RecipeError with all mistakes, InputError when there is nothing at the URL."""
    if "://" not in place:
        return load(place, overrides)
    folder, _, name = place.rpartition("/")
    try:
        body = open_storage(folder, deadline_s=DEADLINE_S).read(name)
    except FileNotFoundError:
        raise InputError(f"there is no recipe at {place}") from None
    return loads(body, place, overrides)
