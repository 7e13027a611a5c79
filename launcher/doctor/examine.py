"""``muster doctor``: a preflight check on the workers that would train, within a minute."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.cli.options import TrustOption
from trainer.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from launcher.doctor.findings import Finding
    from launcher.doctor.observations import Examination
    from trainer.recipe import Recipe

TABLE_WIDTH = 160


def doctor(
    recipe: Annotated[str | None, typer.Argument(metavar="[RECIPE]", help="a recipe: YAML or JSON file")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="changes, by dotted path")
    ] = None,
    on: Annotated[
        str | None,
        typer.Option(help="local | ray | slurm | kubernetes: where to look; without it, RAY_ADDRESS decides"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Look at the workers that would train RECIPE, or at every node: versions, GPUs, network, clocks, disks, storage,
    inputs, and room for the plan. Exit code 0: ready, perhaps with warnings; 1: not ready."""
    from launcher.cli.app import choose_place
    from launcher.doctor.findings import verdict
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


def examine(recipe: Recipe | None, say: Callable[[str], None]) -> tuple[Examination, list[Finding]]:
    """Joins Ray, or starts a local one, and examines it. ``say`` receives a line per stage.

    Raises InputError if no cluster answers at the address. All other errors become findings.
    """
    from cluster.job_environment import job_environment
    from launcher.doctor.diagnosis import diagnose
    from launcher.doctor.observations import Examination
    from launcher.doctor.stages import Stages, Time, wanted
    from launcher.raytrain.session import quiet_logs, ray_session
    from trainer.recipe import ResourcesSection

    left, address = Time(), job_environment(os.environ).ray_address
    seen = Examination(address, wanted(recipe) if recipe else None)
    say(f"joining Ray at {address}" if address else "starting Ray")
    with ray_session(address, recipe.resources if recipe else ResourcesSection()):
        quiet_logs()
        seen.driver_auth_mode = os.environ.get("RAY_AUTH_MODE")
        Stages(recipe, seen, left, say).run()
    seen.seconds = left.passed_s
    return seen, diagnose(seen)


def _show(seen: Examination, findings: Sequence[Finding]) -> None:
    from launcher.doctor.report import tables
    from launcher.terminal.console import stdout

    console = stdout()
    if not console.is_terminal:
        console = stdout(width=TABLE_WIDTH)
    for part in tables(seen, findings):
        console.print(part)
