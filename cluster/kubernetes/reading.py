"""The state of a job, and what its pods wait for, read from their objects; contacts nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

Fields = dict[str, Any]

SUCCEEDED, FAILED, INTERRUPTED = 0, 1, 3
USAGE = 2
_WAITING = frozenset({"ContainerCreating", "PodInitializing"})


@dataclass(frozen=True)
class Reading:
    """``state`` in the cluster's word; ``exit_code``: muster's if the job has ended, else None; ``detail``: the
    cluster's explanation."""

    state: str
    exit_code: int | None
    detail: str = ""


def of_conditions(made: Fields, completed: str, deadline: str, groups: str) -> Reading:
    """Reads a job whose status has conditions. ``completed``: the condition of one that succeeded; ``deadline``: the
    reason of one that failed because its time was over; ``groups``: the field with the numbers of active pods."""
    status = made.get("status") or {}
    held = {c["type"]: c for c in status.get("conditions", []) if c.get("status") == "True"}
    if completed in held:
        return Reading(completed, SUCCEEDED)
    if failed := held.get("Failed"):
        code = INTERRUPTED if failed.get("reason") == deadline else FAILED
        return Reading("Failed", code, failed.get("message", ""))
    if "Suspended" in held:
        return Reading("Suspended", None)
    active = any(group.get("active") for group in status.get(groups, []))
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
