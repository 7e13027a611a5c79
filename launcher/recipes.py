"""Recipes by their path or URL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from trainer.errors import InputError

if TYPE_CHECKING:
    from trainer.recipe import Recipe

DEADLINE_S = 30.0


def read_recipe(place: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from a file, or from an fsspec URL such as the one under which a submitted recipe was frozen. Raises
    RecipeError with all mistakes, InputError when there is nothing at the URL."""
    from trainer.recipe import load, loads

    if "://" not in place:
        return load(place, overrides)
    from trainer.storage import open_storage

    folder, _, name = place.rpartition("/")
    try:
        text = open_storage(folder, deadline_s=DEADLINE_S).read(name)
    except FileNotFoundError:
        raise InputError(f"there is no recipe at {place}") from None
    return loads(text.decode(), place, overrides)
