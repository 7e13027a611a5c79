"""``muster doctor``: a preflight check on the workers that would train, within a minute."""

from __future__ import annotations

import os
from contextlib import ExitStack
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
    from launcher.child import Child, ChildEnded
    from launcher.doctor.diagnosis import diagnose
    from launcher.raytrain.session import not_started, session_folder

    os.environ.update(recipe.cluster.env if recipe else {})
    address = job_environment(os.environ).ray_address
    say(f"joining Ray at {address}" if address else "starting Ray")
    with ExitStack() as stack:
        if address is None:
            stack.enter_context(session_folder())
        child = Child(Examiner, "muster-doctor", told=say)
        stack.callback(child.kill)
        try:
            seen: Examination = child.submit("examine", recipe, address).result()
        except ChildEnded as error:
            raise not_started(str(error)) from error
    return seen, diagnose(seen)


class Examiner:
    """In the process that uses Ray."""

    def examine(self, recipe: Recipe | None, address: str | None) -> Examination:
        from launcher.capacity import NO_SERVERS, Servers
        from launcher.child import tell
        from launcher.doctor.observations import Examination
        from launcher.doctor.stages import Stages, Time, wanted
        from launcher.raytrain.session import connect
        from trainer.recipe import ResourcesSection

        left, seen = Time(), Examination(address, wanted(recipe) if recipe else None)
        servers = Servers.of(recipe) if recipe else NO_SERVERS
        connect(address, recipe.resources if recipe else ResourcesSection(), servers)
        import ray  # not before `connect`, which sets the token that Ray reads when it is imported

        try:
            seen.driver_auth_mode = os.environ.get("RAY_AUTH_MODE")
            Stages(recipe, seen, left, tell).run()
        finally:
            ray.shutdown()
        seen.seconds = left.passed_s
        return seen
