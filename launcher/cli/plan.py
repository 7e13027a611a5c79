"""``muster plan``: what a run takes, for people in 80 columns or as JSON."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer

from trainer.errors import UsageError

if TYPE_CHECKING:
    pass

UNITS = {"": 1, **{f"{p}{end}": 1000**n for n, p in enumerate("KMGT", 1) for end in ("", "B")}}
UNITS |= {f"{p}IB": 1024**n for n, p in enumerate("KMGT", 1)} | {"B": 1}


def plan(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="a recipe: YAML or JSON file")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="changes, by dotted path")
    ] = None,
    gpu_memory: Annotated[str | None, typer.Option(help="of each GPU, e.g. 24GiB; else that of the GPU here")] = None,
    host_memory: Annotated[str | None, typer.Option(help="that each rank may use of its host's, e.g. 64GiB")] = None,
    tokens_per_s: Annotated[float | None, typer.Option(min=1e-9, help="of all ranks together, for the time")] = None,
    price_per_gpu_hour: Annotated[float | None, typer.Option(min=0, help="for the cost, in any currency")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Show what RECIPE needs on each rank, from the base model's config.json alone, and what to change if it does not
    fit."""
    from rich.text import Text

    from launcher.plan.estimate import make
    from launcher.terminal.console import print_json, stdout
    from trainer.recipe import load

    loaded = load(recipe, overrides or [])
    device, host = (None if text is None else size(text) for text in (gpu_memory, host_memory))
    found = make(loaded, device, host, tokens_per_s, price_per_gpu_hour)
    if as_json:
        print_json(found.to_json())
    else:
        from launcher.plan.table import report

        stdout().print(Text("\n".join(report(found))), soft_wrap=True)


def size(text: str) -> int:
    """Bytes: ``24GiB``, ``80GB``, ``64G`` or a plain number."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in UNITS:
        raise UsageError(f"{text!r} is no size of memory; write it as 24GiB or 80GB")
    return int(float(match[1]) * UNITS[match[2].upper()])
