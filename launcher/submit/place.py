"""Decides where a command runs: as a job of a cluster, or here, and then with which Ray."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from cluster import KINDS
from cluster.job_environment import RAY_JOB
from trainer.errors import UsageError

if TYPE_CHECKING:
    from trainer.recipe import Recipe


def choose_place(on: str | None, address: str | None, recipe: Recipe | None) -> str | None:
    """Returns the kind of cluster to submit a job to, None if the driver runs here; then it sets the environment
    so that the driver joins the right Ray cluster, if any. Raises UsageError for options that contradict each other."""
    if on not in (None, "local", *KINDS):
        raise UsageError(f"--on {on!r} is not one of: local, {', '.join(KINDS)}")
    if address and on not in (None, "ray"):
        raise UsageError(f"--address names a Ray cluster, and --on is {on}: leave one of them out")
    if on == "local":
        for name in ("RAY_ADDRESS", RAY_JOB):
            os.environ.pop(name, None)
        return None
    # Without --on, the environment may name a Ray cluster.
    return _choose_ray(on, address, recipe) if on in (None, "ray") else on


def _choose_ray(on: str | None, address: str | None, recipe: Recipe | None) -> str | None:
    from cluster.ray import api_address

    if address and "://" not in address:
        os.environ["RAY_ADDRESS"] = address
        return None
    if address:
        return "ray"
    joins = "://" not in os.environ.get("RAY_ADDRESS", "://") or RAY_JOB in os.environ
    if on == "ray" and not joins and api_address(recipe.cluster.ray.model_dump() if recipe else {}, os.environ):
        return "ray"
    if on == "ray" and not os.environ.get("RAY_ADDRESS"):
        os.environ["RAY_ADDRESS"] = "auto"
    return None
