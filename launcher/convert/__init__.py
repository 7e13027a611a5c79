"""``muster convert``: turns another trainer's settings into a recipe and names each key that has no counterpart.

A source is a module with ``convert(settings, file, workers) -> Draft`` and a line in SOURCES. The recipe's own model
validates the result before it is printed. If it is not valid, nothing is printed and the obstacles are reported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launcher.convert.draft import Draft
from launcher.convert.writing import written
from trainer.errors import RecipeError, UsageError
from trainer.parsing import Malformed, parse_yaml
from trainer.registry import Choice, Registry

SOURCES = Registry(
    "source of recipes",
    {
        "axolotl": Choice("launcher.convert.axolotl:convert"),
        "llamafactory": Choice("launcher.convert.llamafactory:convert"),
    },
)


def checked(draft: Draft, source: str, file: Path) -> tuple[str, list[str]]:
    """Returns the recipe's text and its obstacles: those that the source found, else the mistakes of the validation."""
    from trainer.recipe import loads

    hindrances = [f"{key}: {reason}" for key, reason in draft.hindrances.items()]
    text = written(draft, source, file)
    if not hindrances:
        try:
            loads(text)
        except RecipeError as error:
            hindrances = [f"{mistake.path}: {mistake.message}" for mistake in error.mistakes]
    return text, hindrances


def read(file: Path) -> dict[str, Any]:
    """Reads the settings by the rules of YAML 1.1, as both programs do; raises UsageError."""
    from trainer.recipe.loading import LARGEST_RECIPE

    try:
        with file.open("rb") as opened:
            body = opened.read(LARGEST_RECIPE + 1)
        if len(body) > LARGEST_RECIPE:
            raise UsageError(f"{file} has more than {LARGEST_RECIPE:,} bytes; settings have a few thousand")
        settings = parse_yaml(body.decode())
    except FileNotFoundError:
        raise UsageError(f"{file}: there is no such file") from None
    except Malformed as error:
        line = f", line {error.line}" if error.line else ""
        raise UsageError(f"{file}{line} is not YAML that can be used: {error}") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read: {error}") from None
    if not isinstance(settings, dict):
        raise UsageError(f"{file} holds no mapping of settings")
    return {str(key): value for key, value in settings.items()}
