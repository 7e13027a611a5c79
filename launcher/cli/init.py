"""``muster init``: print a recipe to start from."""

from __future__ import annotations

from typing import Annotated

import typer

from launcher.terminal.console import stderr
from trainer.errors import RecipeError, UsageError


def init(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="a shipped recipe; without it they are listed")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="PATH", help="base model to look at: folder, URL, or name on the Hub"),
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="FILE", help="rows to look at: file, glob, URL or hf://NAME")
    ] = None,
) -> None:
    """Print a recipe: a shipped one by NAME, or one written after a look at --model and --data. No weights are read."""
    if name is not None and (model or data):
        raise UsageError("give the NAME of a shipped recipe, or --model and --data")
    if (model is None) != (data is None):
        raise UsageError(
            f"--{'data' if data is None else 'model'} is missing: a recipe is written after a look at both"
        )
    if name is not None:
        print(shipped_text(name), end="")
    elif model is not None and data is not None:
        print(looked_at(model, data), end="")
    else:
        print_list()


def shipped_text(name: str) -> str:
    from launcher.init.writing import owned
    from trainer.recipe.loading import recipe_name, shipped
    from trainer.registry import choose_hint

    recipes, wanted = shipped(), recipe_name(name)
    if wanted not in recipes:
        raise UsageError(f"{name!r} is no shipped recipe; muster init lists them{choose_hint(wanted, tuple(recipes))}")
    return owned(recipes[wanted])


def looked_at(model: str, data: str) -> str:
    from launcher.init import base_model, rows
    from launcher.init.choices import choices
    from launcher.init.gpus import gpus_here
    from launcher.init.writing import written
    from trainer.recipe import loads

    text = written(choices(base_model.look(model), rows.look(data), gpus_here()), model, data)
    try:
        loads(text, "the recipe")
    except RecipeError as error:
        raise UsageError(f"no recipe can be written for {model} and {data}: {error.mistakes[0].message}") from None
    return text


def print_list() -> None:
    from launcher.init.shipped import listed
    from trainer.recipe.loading import shipped

    rows = listed(shipped())
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    stderr().print("muster init NAME > my.yaml writes one; muster run NAME runs it as it is", soft_wrap=True)
