"""``muster plan``: what a run takes, for people in 80 columns or as JSON."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trainer.errors import UsageError
from trainer.fast_imports import load_libraries

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trainer.plan import Plan, RunLength, Suggestion
    from trainer.recipe import Recipe

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
    """Say what RECIPE takes on each rank, from the base's config.json alone, and what to change if it does not fit."""
    from rich.text import Text

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


class PlanReport:
    """Everything that the command has to tell."""

    def __init__(
        self,
        recipe: Recipe,
        plan: Plan,
        suggestions: Sequence[Suggestion],
        outlook: RunLength,
        price: float | None,
    ) -> None:
        self.recipe, self.plan, self.suggestions = recipe, plan, suggestions
        self.outlook, self.price = outlook, price

    @property
    def hours(self) -> float | None:
        return self.outlook.hours(self.plan.tokens_per_step)

    @property
    def gpu_hours(self) -> float | None:
        """Hours of all GPUs together, of all ranks where there are none."""
        per_rank = max(1, self.recipe.resources.gpus_per_worker)
        return None if self.hours is None else self.hours * self.plan.world_size * per_rank

    @property
    def cost(self) -> float | None:
        return None if self.price is None or self.gpu_hours is None else self.price * self.gpu_hours

    def to_json(self) -> dict[str, Any]:
        outlook = self.outlook
        return {
            **self.plan.to_json(),
            "steps": outlook.steps,
            "steps_per_epoch": outlook.steps_per_epoch,
            "samples_per_epoch": outlook.samples_per_epoch,
            "tokens_per_s": outlook.tokens_per_s,
            "hours": self.hours,
            "gpu_hours": self.gpu_hours,
            "cost": self.cost,
            "suggestions": [
                {
                    "overrides": list(s.overrides),
                    "world_size": s.plan.world_size,
                    "peak_device_bytes": s.plan.peak_device_bytes,
                    "peak_host_bytes": s.plan.peak_host_bytes,
                }
                for s in self.suggestions
            ],
        }


def make(recipe: Recipe, device: int | None, host: int | None, speed: float | None, price: float | None) -> PlanReport:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses kernels that a plan does not call
    load_libraries()
    from trainer.plan import Limits, Planner, RunLengthQuery, read_base, suggestions

    inquiry = RunLengthQuery(recipe, speed)
    base = read_base(recipe.model)
    notes = [base.note] if base.note else []
    limits = Limits(device, host)
    if device is None and recipe.resources.gpus_per_worker > 0 and (here := gpu_here()) is not None:
        limits = Limits(here[1], host)
        notes.append(f"measured against the GPU here: {here[0]}")
    planner, ranks = Planner(base.config, limits), recipe.resources.min_workers
    if recipe.resources.max_workers != ranks:
        notes.append(
            f"planned for the fewest workers, {ranks}; each keeps less with more, up to {recipe.resources.max_workers}"
        )
    plan = planner.plan(recipe, ranks, tuple(notes))
    advice = suggestions(planner, recipe, ranks) if plan.fits is False else []
    return PlanReport(recipe, plan, advice, inquiry.outlook(), price)


def gpu_here() -> tuple[str, int] | None:
    """The name and the bytes of this machine's first GPU, if there is one."""
    import torch

    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    return found.name, found.total_memory
