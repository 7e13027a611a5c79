"""Recipes by their path or URL."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

from trainer.errors import InputError
from trainer.recipe import Recipe, load, loads
from trainer.recipe.trust import granted
from trainer.redact import credential_in
from trainer.run import layout
from trainer.storage import open_storage

ENDINGS = (".yaml", ".yml", ".json")
DEADLINE_S = 30.0
_SUBMITTED = re.compile(rf"{layout.SUBMITTED}/[^/]*-([0-9a-f]{{32}})\.yaml$")


def is_recipe(place: str) -> bool:
    """Whether this names a recipe rather than a run."""
    return place.endswith(ENDINGS)


def digest_of(body: bytes) -> str:
    """The digest in the name of a submitted recipe, so that the job's command names the bytes that were submitted."""
    return hashlib.sha256(body).hexdigest()[:32]


def recipe_at(place: str, overrides: Sequence[str] = (), *, trust: bool = False) -> Recipe:
    """A recipe from a file, or from an fsspec URL such as the one under which a submitted recipe was frozen. A file is
    its user's word; code that a recipe at a URL names needs the user's ``trust``.

    Raises RecipeError with all mistakes, InputError when there is nothing at the URL, or not what was submitted."""
    submitted = _SUBMITTED.search(place)
    if "://" not in place and not submitted:
        return load(place, overrides)
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
    recipe = loads(body, place, overrides)
    return recipe if "://" not in place else granted(recipe, place, trust=trust, submits=True)
