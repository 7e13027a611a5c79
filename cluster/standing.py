"""Where this process stands, read off its environment: in which job, and beside which Ray cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Standing:
    """``job`` identifies the scheduler's job across its restarts (a requeued Slurm job keeps its id), or is None;
    ``ray_address`` is the cluster that a driver here should join, or None: then it starts its own."""

    job: str | None
    ray_address: str | None


def standing(environment: Mapping[str, str]) -> Standing:
    """``RAY_ADDRESS`` names a cluster; inside a submitted Ray job the cluster is the one that the job runs on."""
    address = environment.get("RAY_ADDRESS") or None
    if address is None and "RAY_JOB_CONFIG_JSON_ENV_VAR" in environment:
        address = "auto"
    return Standing(_job(environment), address)


def _job(environment: Mapping[str, str]) -> str | None:
    if slurm := environment.get("SLURM_JOB_ID"):
        return f"slurm:{slurm}"
    if rayjob := environment.get("MUSTER_RAYJOB"):
        return f"rayjob:{rayjob}"
    if elastic := environment.get("TORCHELASTIC_RUN_ID", "none"):
        return None if elastic == "none" else f"torchrun:{elastic}"
    return None
