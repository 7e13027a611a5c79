"""Reads from the environment in which job this process runs, and next to which Ray cluster."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""The variable in which Ray tells the driver of a submitted job what it was submitted with."""

VARIABLES = (
    *("RAY_ADDRESS", RAY_JOB, "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_JOB_ID", "SLURM_JOB_NUM_NODES"),
    *("MUSTER_RAYJOB", "MUSTER_NAMESPACE", "TORCHELASTIC_RUN_ID"),
)
"""All variables that are read here."""


@dataclass(frozen=True)
class JobEnvironment:
    """``job`` identifies the scheduler's job across its restarts (a requeued Slurm job keeps its id) as ``kind:id``;
    None outside a job. ``ray_address``: the cluster that a driver here should join; None: it starts its own.
    ``nodes``: how many the job has permanently, 0 if that is not known."""

    job: str | None
    ray_address: str | None
    nodes: int = 0


def job_environment(environment: Mapping[str, str]) -> JobEnvironment:
    """``RAY_ADDRESS`` names a cluster; inside a submitted Ray job the cluster is the one that the job runs on."""
    address = environment.get("RAY_ADDRESS") or None
    if address is None and RAY_JOB in environment:
        address = "auto"
    return JobEnvironment(_job(environment), address, int(environment.get("SLURM_JOB_NUM_NODES") or 0))


def _job(environment: Mapping[str, str]) -> str | None:
    if array := environment.get("SLURM_ARRAY_JOB_ID"):  # the number alone may mean all jobs of the array
        return f"slurm:{array}_{environment['SLURM_ARRAY_TASK_ID']}"
    if slurm := environment.get("SLURM_JOB_ID"):
        return f"slurm:{slurm}"
    if rayjob := environment.get("MUSTER_RAYJOB"):
        namespace = environment.get("MUSTER_NAMESPACE")
        return f"kubernetes:{namespace}/{rayjob}" if namespace else f"kubernetes:{rayjob}"
    if RAY_JOB in environment and (ray_job := _submission(environment[RAY_JOB])):
        return f"ray:{ray_job}"
    if elastic := environment.get("TORCHELASTIC_RUN_ID", "none"):
        return None if elastic == "none" else f"torchrun:{elastic}"
    return None


def _submission(config: str) -> str | None:
    """The id that the job was submitted under."""
    try:
        found = json.loads(config)["metadata"]["job_submission_id"]
    except (ValueError, KeyError, TypeError):
        return None
    return str(found) if found else None
