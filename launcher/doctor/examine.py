"""``muster doctor``: a preflight check on the workers that would train, within a minute."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from launcher.doctor.findings import Finding
    from launcher.doctor.observations import Examination
    from trainer.recipe import Recipe


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
