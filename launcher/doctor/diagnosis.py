"""Turns an `Examination` into findings. Pure functions; each threshold is commented with its reason."""

from __future__ import annotations

from collections.abc import Iterator

from launcher.doctor.checks_cluster import alike, clocks, groups, hosts, pairs, replicas, settings
from launcher.doctor.checks_host import gpus, memory_and_disks
from launcher.doctor.checks_recipe import inputs, room, storage
from launcher.doctor.findings import Finding, failure
from launcher.doctor.observations import Examination


def diagnose(seen: Examination) -> list[Finding]:
    """Returns all findings, failures first; within a level, in the order in which to fix them."""
    found = list(_all(seen))
    return [f for f in found if f.level == "failure"] + [f for f in found if f.level == "warning"]


def _all(seen: Examination) -> Iterator[Finding]:
    yield from hosts(seen)
    if seen.placement_error:
        yield failure(
            "the cluster", seen.placement_error, "see `ray status`, then request fewer resources, or add nodes"
        )
    yield from pairs(seen)
    yield from groups(seen)
    yield from replicas(seen)
    yield from alike(seen)
    yield from gpus(seen)
    yield from memory_and_disks(seen)
    yield from clocks(seen)
    yield from storage(seen)
    yield from inputs(seen)
    yield from room(seen)
    yield from settings(seen)
    if not seen.ranks:
        yield failure("the cluster", "no host answered", "check `ray status` and the logs of `ray start`")
