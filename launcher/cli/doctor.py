"""``muster doctor``: the options, and the tables on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from launcher.cli import completion
from launcher.cli.options import PLACES, JsonOption, Overrides, TrustOption
from trainer.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launcher.doctor.findings import Finding
    from launcher.doctor.observations import Examination


TABLE_WIDTH = 160


def doctor(
    recipe: Annotated[str | None, typer.Argument(metavar="[RECIPE]", help="a recipe: YAML or JSON file")] = None,
    overrides: Overrides = None,
    on: Annotated[
        str | None,
        typer.Option(
            metavar="PLACE",
            autocompletion=completion.one_of(*PLACES),
            help=f"{' | '.join(PLACES)}: where to look; without it, RAY_ADDRESS decides",
        ),
    ] = None,
    as_json: JsonOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Look at the workers that would train RECIPE, or at every node: versions, GPUs, network, clocks, disks, storage,
    inputs, and room for the plan. Exit code 0: ready, perhaps with warnings; 1: not ready."""
    from launcher.doctor.examine import examine
    from launcher.doctor.findings import verdict
    from launcher.submit.place import choose_place
    from launcher.submit.submit import doctor_elsewhere
    from launcher.terminal.console import print_json, stderr
    from trainer.run.recipe_url import recipe_at

    loaded = recipe_at(recipe, overrides or [], trust=trust_remote_code) if recipe else None
    place = choose_place(on, None, loaded)
    if place is not None:
        if loaded is None:
            raise UsageError(f"--on {place} starts a job, whose size is in a recipe: name a recipe")
        raise typer.Exit(doctor_elsewhere(loaded, place, as_json=as_json))
    seen, findings = examine(loaded, stderr().print)
    if as_json:
        from launcher.doctor.report import to_json

        print_json(to_json(seen, findings))
    else:
        _show(seen, findings)
    if verdict(findings) == "not ready":
        raise typer.Exit(1)


def _show(seen: Examination, findings: Sequence[Finding]) -> None:
    from launcher.doctor.report import tables
    from launcher.terminal.console import stdout

    console = stdout()
    if not console.is_terminal:
        console = stdout(width=TABLE_WIDTH)
    for part in tables(seen, findings):
        console.print(part)
