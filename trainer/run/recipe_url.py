"""Reads recipes from a path or URL."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainer.errors import InputError, Mistake, MusterError, RecipeError
from trainer.recipe import Recipe, load, loads
from trainer.recipe.document import read_yaml
from trainer.recipe.loading import given, read_file
from trainer.recipe.plugins import TABLES
from trainer.recipe.trust import granted
from trainer.redact import credential_in
from trainer.run import layout
from trainer.run.frozen import missing_plugins
from trainer.storage import open_storage

ENDINGS = (".yaml", ".yml", ".json")
DEADLINE_S = 30.0
LOOK_S = 5.0
_SUBMITTED = re.compile(rf"{layout.SUBMITTED}/[^/]*-([0-9a-f]{{32}})\.yaml$")


def is_recipe(place: str) -> bool:
    """Returns whether ``place`` names a recipe rather than a run."""
    return place.endswith(ENDINGS)


def digest_of(body: bytes) -> str:
    """Returns the digest for the name of a submitted recipe. By it the job's command names exactly those bytes."""
    return hashlib.sha256(body).hexdigest()[:32]


def recipe_at(place: str, overrides: Sequence[str] = (), *, trust: bool = False) -> Recipe:
    """Reads a recipe from a file, or from an fsspec URL such as that of a submitted recipe. A local file is trusted;
    code that a recipe at a URL names needs the user's ``trust``.

    Raises RecipeError with all mistakes; InputError when nothing exists at the URL, or when a submitted recipe was
    changed."""
    submitted = _SUBMITTED.search(place)
    if "://" not in place and not submitted:
        try:
            return load(place, overrides)
        except RecipeError as error:
            raise RecipeError((*error.mistakes, *_missing_plugins(place, error))) from error
    if what := credential_in(place):
        raise InputError(
            f"the recipe's address holds credentials ({what}), and it is stored and printed; take them out, and give "
            "them in the environment (for S3 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ~/.aws/credentials)"
        )
    folder, _, name = place.rpartition("/")
    try:
        body = open_storage(folder, deadline_s=DEADLINE_S).read(name)
    except FileNotFoundError:
        raise InputError(f"there is no recipe at {place}") from None
    if submitted and digest_of(body) != submitted[1]:
        raise InputError(f"{place} is not the recipe that was submitted: it was changed since; submit the run again")
    own = "://" not in place
    recipe = loads(body, place, overrides, imports=own or trust)
    return recipe if own else granted(recipe, place, trust=trust, submits=True)


def given_at(place: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Returns a recipe that `recipe_at` accepts as plain data with the overrides, without filled-in defaults."""
    if "://" not in place and not _SUBMITTED.search(place):
        return given(*read_file(place), overrides)
    folder, _, name = place.rpartition("/")
    return given(open_storage(folder, deadline_s=DEADLINE_S).read(name), place, overrides)


def _missing_plugins(place: str, error: RecipeError) -> list[Mistake]:
    """Returns the packages of plug-ins that the recipe's run was started with and that are not installed here, if the
    recipe names a row that is not there."""
    places = ["plugins", *(path[0] for path in TABLES)]
    if not any(mistake.path.startswith(tuple(places)) for mistake in error.mistakes):
        return []
    with suppress(MusterError, OSError):
        data = read_yaml(Path(place).read_text(encoding="utf-8")).data
        if isinstance(data, dict) and isinstance(data.get("storage"), str) and isinstance(data.get("name"), str):
            return missing_plugins(open_storage(data["storage"], deadline_s=LOOK_S).child(data["name"]))
    return []
