"""``muster sweep``: trains a recipe with several settings, and compares the runs."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launcher.cli.options import AddressOption, DetachOption, PlaceOption, RecipeFile, TakeoverOption, TrustOption
from launcher.submit import submit
from launcher.submit.place import choose_place
from launcher.terminal.console import print_json, stderr, stdout
from trainer.errors import Interrupted, WorkerFailed
from trainer.interruption import current
from trainer.recipe import Recipe
from trainer.recipe.sweeps.trials import as_text, split_words
from trainer.run.recipe_url import given_at, recipe_at
from trainer.run.sweep import FAILED

if TYPE_CHECKING:
    from launcher.sweep.table import TrialRow


def sweep(
    recipe: RecipeFile,
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=V1,V2...]...", help="settings that vary, and KEY=VALUE for all trials"),
    ] = None,
    metric: Annotated[str | None, typer.Option(metavar="NAME", help="metric that compares the trials")] = None,
    trials: Annotated[int | None, typer.Option(min=1, metavar="N", help="number of trials")] = None,
    parallel: Annotated[int | None, typer.Option(min=1, metavar="N", help="trials that train at the same time")] = None,
    search: Annotated[
        str | None, typer.Option(metavar="NAME", help="how trials are chosen: grid | random | tpe | gp")
    ] = None,
    stop: Annotated[
        str | None, typer.Option(metavar="NAME", help="rule that stops trials early: none | asha | median")
    ] = None,
    together: Annotated[
        bool, typer.Option("--together", help="all trials in the same processes, on one base model")
    ] = False,
    on: PlaceOption = None,
    address: AddressOption = None,
    takeover: TakeoverOption = False,
    detach: DetachOption = False,
    price_per_gpu_hour: Annotated[
        float | None, typer.Option(min=0, metavar="PRICE", help="price of a GPU, in any currency, to show the cost")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="the table as a JSON list on stdout")] = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Train RECIPE with several settings, each as a run, and compare them. Running it again resumes it."""
    options = {"metric": metric, "trials": trials, "parallel": parallel, "search": search, "stop": stop}
    options["together"] = together or None
    loaded, base = read_sweep(recipe, words or [], options, trust=trust_remote_code)
    if (place := choose_place(on, address, loaded)) is not None:
        flags = ["--takeover"] if takeover else []
        submit.sweep_elsewhere(loaded, as_text(base), place, flags, address, detach=detach)
        return
    from launcher.sweep.ending import show_end

    rows = sweep_here(loaded, base, takeover=takeover)
    if as_json:
        print_json([row.to_json() for row in rows])
    show_end(loaded, base, rows, None if as_json else stdout(), stderr(), price_per_gpu_hour)
    if failed := sum(row.state == FAILED for row in rows):
        raise WorkerFailed(f"{failed} of {len(rows)} trials failed; their causes are above")


def sweep_here(recipe: Recipe, base: dict[str, Any], *, takeover: bool) -> list[TrialRow]:
    """Runs a sweep from this process, and returns its trials."""
    os.environ.update(recipe.cluster.env)  # before the libraries that read it are imported
    from launcher.monitor.progress import Progress
    from launcher.sweep.sweep import RESUMES, sweep

    current.command(RESUMES)
    try:
        return sweep(recipe, base, Progress(stderr()), takeover=takeover)
    except KeyboardInterrupt:  # typer would make an exit code of its own of it
        raise Interrupted(current.sentence() if current.heard else RESUMES) from None


def read_sweep(
    place: str, words: list[str], options: dict[str, Any], *, trust: bool = False
) -> tuple[Recipe, dict[str, Any]]:
    """Returns the recipe with its section `sweep`, and the same as plain data without filled-in defaults. ``words``
    and ``options`` that are not None go before what the section has. Raises RecipeError with all mistakes."""
    overrides, parameters = split_words(words)
    recipe_at(place, overrides, trust=trust)  # so that mistakes have the lines of the user's file
    section = dict(given_at(place, overrides).get("sweep") or {})
    fixed = {word.partition("=")[0].strip() for word in overrides}
    varied = {key: value for key, value in (section.get("parameters") or {}).items() if key not in fixed}
    section |= {key: value for key, value in options.items() if value is not None}
    section["parameters"] = {**varied, **parameters}
    whole = [*overrides, f"sweep={json.dumps(section, ensure_ascii=False, default=str)}"]
    return recipe_at(place, whole, trust=trust), given_at(place, whole)
