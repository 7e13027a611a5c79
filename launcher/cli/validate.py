"""``muster validate`` and ``muster schema``: check a recipe, here or in an editor."""

from __future__ import annotations

import json
import os
import re
from typing import Annotated

import typer
from rich.text import Text

from launcher.cli.options import PluginsOption
from launcher.terminal.console import stderr
from launcher.terminal.exit_codes import error_text
from trainer.errors import UsageError

OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")


def validate(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="RECIPE|KEY=VALUE", help="recipes to check, and changes to all of them"),
    ] = None,
    all_shipped: Annotated[bool, typer.Option("--all", help="check every recipe that muster ships")] = False,
    inputs: Annotated[bool, typer.Option("--inputs", help="contact model, data and storage as well")] = False,
) -> None:
    """Report every mistake of each RECIPE, with its line. Nothing is created, and nothing is contacted without
    --inputs."""
    from cluster import KINDS, renderer_of
    from launcher.replica_warnings import replica_warnings
    from launcher.submit.submit import cluster_errors, job_of
    from trainer.recipe import load
    from trainer.recipe.loading import shipped
    from trainer.recipe.rules.together import check_together
    from trainer.recipe.sweeps.trials import check_trials, trials_of
    from trainer.recipe.sweeps.variants import variants
    from trainer.run.recipe_url import given_at

    overrides = [word for word in words or [] if OVERRIDE.match(word) and not os.path.exists(word)]
    paths = [word for word in words or [] if word not in overrides]
    paths += map(str, shipped().values()) if all_shipped else []
    if not paths:
        raise UsageError("name a recipe to validate, or --all")
    console, failed = stderr(), False
    for path in paths:
        try:
            loaded = load(path, overrides)
            if loaded.sweep is not None:
                check_trials(given_at(path, overrides), loaded.sweep)
            if loaded.sweep is not None and loaded.sweep.together:
                check_together(trials_of(given_at(path, overrides), loaded.sweep))
            if loaded.adapters:
                variants(given_at(path, overrides))
            for kind in (name for name in loaded.cluster.given() if name in KINDS):
                with cluster_errors():
                    renderer_of(kind).render(job_of(loaded, kind, arguments=(path,)))
            if inputs:
                from launcher.driver.driver import check_inputs
                from launcher.monitor.progress import Progress

                check_inputs(loaded, Progress(console))
            for text in replica_warnings(loaded):
                console.print(Text(f"{path}: warning: {text}"), soft_wrap=True)
            console.print(Text(f"ok  {path}"), soft_wrap=True)
        except UsageError as error:
            failed = True
            console.print(Text(error_text(error, path)), soft_wrap=True)
    if failed:
        raise typer.Exit(2)


def schema(plugins: PluginsOption = False) -> None:
    """Print the recipe's JSON Schema, for editors."""
    from trainer.recipe import schema as recipe_schema
    from trainer.recipe.plugins import use_installed

    if plugins:
        use_installed()

    print(json.dumps(recipe_schema(), indent=2))
