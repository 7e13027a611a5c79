"""``muster plan``: the memory, time and cost of a run, as a table of 80 columns or as JSON."""

from __future__ import annotations

from typing import Annotated

import typer

from launcher.cli.options import JsonOption, Overrides, RecipeFile
from launcher.plan.units import bandwidths, size


def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    gpu_memory: Annotated[
        str | None, typer.Option(help="memory of each GPU, e.g. 24GiB; default: that of the GPU here")
    ] = None,
    host_memory: Annotated[str | None, typer.Option(help="host memory that each rank may use, e.g. 64GiB")] = None,
    tokens_per_s: Annotated[
        float | None, typer.Option(min=1e-9, metavar="NUMBER", help="speed of all ranks together, to estimate the time")
    ] = None,
    price_per_gpu_hour: Annotated[
        float | None, typer.Option(min=0, metavar="PRICE", help="price of a GPU, in any currency, to estimate the cost")
    ] = None,
    network: Annotated[
        str | None,
        typer.Option(help="bandwidth of each rank, e.g. 25GB/s; two as 300GB/s,25GB/s: in a replica and between them"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what RECIPE needs on each rank, from the base model's config.json alone, and what to change if it does not
    fit. An estimate comes at once on stderr; the plan, which is measured, follows on stdout."""
    from rich.text import Text

    from launcher.monitor.progress import Progress
    from launcher.plan.table import first_lines
    from launcher.replica_warnings import replica_warnings
    from launcher.terminal.console import print_json, stderr, stdout
    from trainer.recipe import load
    from trainer.recipe.sweeps.variants import variants
    from trainer.run.recipe_url import given_at

    loaded = load(recipe, overrides or [])
    together = variants(given_at(recipe, overrides or [])) if loaded.adapters else []
    loaded = together[0] if together else loaded
    device, host = (None if text is None else size(text) for text in (gpu_memory, host_memory))
    bandwidth = None if network is None else bandwidths(network)
    console = stderr()
    say = Progress(console).phase
    say("planning")
    console.print(Text("\n".join(first_lines(loaded, device))), soft_wrap=True)
    for text in replica_warnings(loaded):
        console.print(Text(f"warning: {text}"), soft_wrap=True)
    from launcher.plan.estimate import make

    found = make(loaded, device, host, tokens_per_s, price_per_gpu_hour, bandwidth, say, together)
    if as_json:
        print_json(found.to_json())
    else:
        stdout().print(Text(str(found)), soft_wrap=True)
