"""``muster validate`` and ``muster schema``: check a recipe, here or in an editor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from launcher.cli.exit_codes import error_text
from launcher.terminal.console import stderr
from trainer.errors import UsageError

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def validate(
    recipes: Annotated[list[str] | None, typer.Argument(metavar="[RECIPE]...", help="recipes to check")] = None,
    shipped: Annotated[bool, typer.Option("--all", help="check every recipe that muster ships")] = False,
    inputs: Annotated[bool, typer.Option("--inputs", help="contact model, data and storage as well")] = False,
) -> None:
    """Report every mistake of each RECIPE, with its line. Nothing is created, and nothing is contacted without
    --inputs."""
    from trainer.recipe import load

    paths = [*(recipes or []), *(sorted(map(str, RECIPES.glob("*.yaml"))) if shipped else [])]
    if not paths:
        raise UsageError("name a recipe to validate, or --all")
    console, failed = stderr(), False
    for path in paths:
        try:
            loaded = load(path)
            if inputs:
                from launcher.driver.driver import check_inputs
                from launcher.monitor.progress import Progress

                check_inputs(loaded, Progress(console))
            console.print(Text(f"ok  {path}"), soft_wrap=True)
        except UsageError as error:
            failed = True
            console.print(Text(error_text(error, path)), soft_wrap=True)
    if failed:
        raise typer.Exit(2)


def schema() -> None:
    """Print the recipe's JSON Schema, for editors."""
    from trainer.recipe import schema as recipe_schema

    print(json.dumps(recipe_schema(), indent=2))
