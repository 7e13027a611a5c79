"""Reads the state of a RayJob, a JobSet and their pods from their objects; contacts nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

Fields = dict[str, Any]

SUCCEEDED, FAILED, INTERRUPTED = 0, 1, 3
USAGE = 2
_RAY_ENDED = frozenset({"Complete", "Failed", "ValidationFailed"})
_EXIT_CODE = re.compile(r"entrypoint command failed with exit code (-?\d+)")
"""What Ray's job supervisor writes as the job's message."""
_WAITING = frozenset({"ContainerCreating", "PodInitializing"})


@dataclass(frozen=True)
class Reading:
    """``state`` in the cluster's word; ``exit_code``: muster's if the job has ended, else None; ``detail``: the
    cluster's explanation."""

    state: str
    exit_code: int | None
    detail: str = ""


def read(made: Fields) -> Reading:
    """Reads a RayJob or a JobSet as `kubectl get -o json` prints it."""
    reading = _jobset(made) if made.get("kind") == "JobSet" else _rayjob(made)
    if made["metadata"].get("deletionTimestamp"):
        return Reading("Terminating", reading.exit_code, reading.detail)
    return reading


def _rayjob(made: Fields) -> Reading:
    status = made.get("status") or {}
    state = status.get("jobDeploymentStatus") or "Pending"
    message = status.get("message") or ""
    if state not in _RAY_ENDED:
        return Reading(state, None, message)
    if state == "ValidationFailed":
        return Reading(state, USAGE, message)
    job = status.get("jobStatus")
    if job == "SUCCEEDED":
        return Reading(state, SUCCEEDED)
    if job == "STOPPED":
        return Reading(state, INTERRUPTED, message)
    found = _EXIT_CODE.search(message)
    code = int(found[1]) if found else FAILED
    # Ray's message ends with the job's last lines, which were passed on already.
    detail = message.partition(", last available logs")[0]
    reason = status.get("reason", "")
    return Reading(state, code if code in (1, 2, 3) else FAILED, f"{reason}: {detail}".strip(": "))


def _jobset(made: Fields) -> Reading:
    status = made.get("status") or {}
    held = {c["type"]: c for c in status.get("conditions", []) if c.get("status") == "True"}
    if "Completed" in held:
        return Reading("Completed", SUCCEEDED)
    if "Failed" in held:
        return Reading("Failed", FAILED, held["Failed"].get("message", ""))
    if "Suspended" in held:
        return Reading("Suspended", None)
    active = any(group.get("active") for group in status.get("replicatedJobsStatus", []))
    return Reading("Running" if active else "Pending", None)


def waits_for(pods: Iterable[Fields]) -> list[str]:
    """Returns the reasons why pods do not run yet, each once: no room, no image, no secret."""
    reasons: dict[str, int] = {}
    for pod in pods:
        status = pod.get("status") or {}
        for condition in status.get("conditions", []):
            if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
                _count(reasons, f"not scheduled: {condition.get('message', condition.get('reason', ''))}")
        for container in status.get("containerStatuses", []):
            waiting = (container.get("state") or {}).get("waiting") or {}
            if waiting.get("reason") and waiting["reason"] not in _WAITING:
                _count(reasons, f"{waiting['reason']}: {waiting.get('message', '')}".strip(": "))
    return [f"{count} {'pods' if count > 1 else 'pod'}: {reason}" for reason, count in reasons.items()]


def _count(reasons: dict[str, int], reason: str) -> None:
    reasons[reason] = reasons.get(reason, 0) + 1


def newest_started(pods: Iterable[Fields]) -> str | None:
    """Returns the name of the newest pod that has lines to read."""
    started = [pod for pod in pods if (pod.get("status") or {}).get("phase") in ("Running", "Succeeded", "Failed")]
    newest = max(started, key=lambda pod: str(pod["metadata"].get("creationTimestamp", "")), default=None)
    return str(newest["metadata"]["name"]) if newest else None
