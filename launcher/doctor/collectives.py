"""Measures the bandwidth in the groups of the recipe's mesh: inside each replica, and across replicas.

The groups of an axis are measured at the same time, since in training they use the network at the same time.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from launcher.doctor.observations import Axis, GroupBandwidth
from launcher.doctor.probes import Bandwidth, GroupResult
from trainer.recipe.strategies import Mesh

PING_S = 3.0
STORE_S = 3.0
GROUP_S = 5.0
LEAST_S = 2.0
"""With less time left, a group is left out: the measurement would fail for want of time."""
LATE_S = 1.5
"""How much longer than its own limit the answer of a rank may take."""

Calls = Mapping[int, tuple[str, tuple[Any, ...]]]
"""By rank: a method of its probe, and the arguments."""
Call = Callable[[Calls, float], tuple[dict[int, Any], dict[int, str]]]
"""Makes all calls at the same time, and returns answers and errors by rank when all are there or the time is over."""


def groups_of(mesh: Mesh) -> dict[Axis, list[tuple[int, ...]]]:
    """Returns the groups of ranks of each axis with more than one rank. A mesh of one axis has one group of all."""
    each, every = mesh.ranks_per_replica, range(mesh.ranks)
    if mesh.ranks == 1:
        return {}
    if mesh.replicas == 1 or each == 1:
        return {"all": [tuple(every)]}
    inside = [tuple(every[first : first + each]) for first in every[::each]]
    return {"inside": inside, "across": [tuple(every[place::each]) for place in range(each)]}


def measure_groups(
    mesh: Mesh, addresses: Mapping[int, str], call: Call, left: Callable[[float], float], *, gpu: bool
) -> list[GroupBandwidth]:
    """Returns a result for each group. ``addresses``: of the ranks that have answered so far; ``left``: returns the
    time in seconds that is left, up to its argument. A rank that does not answer in one group is not waited for in the
    next."""
    found: list[GroupBandwidth] = []
    _, lost = call(dict.fromkeys(addresses, ("clock", ())), left(PING_S))
    lost |= {rank: "its probe did not start" for rank in range(mesh.ranks) if rank not in addresses}
    for axis, groups in groups_of(mesh).items():
        measured = list(_measure_axis(axis, groups, addresses, call, left, lost, gpu=gpu))
        for group in measured:
            lost |= group.silent
        found += measured
    return found


def _measure_axis(
    axis: Axis,
    groups: Sequence[tuple[int, ...]],
    addresses: Mapping[int, str],
    call: Call,
    left: Callable[[float], float],
    lost: Mapping[int, str],
    *,
    gpu: bool,
) -> Iterator[GroupBandwidth]:
    complete = [group for group in groups if not lost.keys() & set(group)]
    stores: dict[int, int] = {}
    silent = dict(lost)
    if complete and left(GROUP_S) > LEAST_S:
        stores, errors = call({g[0]: ("open_store", (addresses[g[0]],)) for g in complete}, left(STORE_S))
        silent |= errors
    limit_s = left(GROUP_S)
    once = uuid.uuid4().hex  # a store keeps the addresses of an earlier group of the same name
    calls: dict[int, tuple[str, tuple[Any, ...]]] = {}
    for group in complete if limit_s > LEAST_S else ():
        if (first := group[0]) in stores:
            name, at = f"{axis}-{first}-{once}", (addresses[first], stores[first])
            for place, rank in enumerate(group):
                calls[rank] = ("bandwidth", (name, at if place else None, place, len(group), gpu, limit_s))
    answers, errors = call(calls, limit_s * LATE_S) if calls else ({}, {})
    silent |= errors
    for group in groups:
        yield _result(axis, group, answers, {rank: silent[rank] for rank in group if rank in silent})


def _result(
    axis: Axis, group: tuple[int, ...], answers: Mapping[int, GroupResult], silent: Mapping[int, str]
) -> GroupBandwidth:
    results = [answers[rank] for rank in group if rank in answers]
    errors = [result.error for result in results if result.error is not None]
    measured = [result.bandwidth for result in results if result.bandwidth is not None]
    if silent or errors:
        return GroupBandwidth(axis, group, error=next(iter([*silent.values(), *errors])), silent=dict(silent))
    return GroupBandwidth(axis, group, slowest(measured) if measured else None)


def slowest(measured: Collection[Bandwidth]) -> Bandwidth:
    """Returns the least of each figure: a collective is as fast as its slowest rank."""
    return replace(
        next(iter(measured)),
        all_reduce_bytes_per_s=min(one.all_reduce_bytes_per_s for one in measured),
        all_gather_bytes_per_s=min(one.all_gather_bytes_per_s for one in measured),
    )


def network_option(groups: Sequence[GroupBandwidth]) -> str | None:
    """Returns the value of ``muster plan --network``, of the slower collective in the slowest group of each axis; None
    unless every axis was measured."""
    rates = []
    for axis in dict.fromkeys(group.axis for group in groups):
        measured = [group.bandwidth for group in groups if group.axis == axis and group.bandwidth is not None]
        if not measured:
            return None
        least = slowest(measured)
        rates.append(rate(min(least.all_reduce_bytes_per_s, least.all_gather_bytes_per_s)))
    return ",".join(rates) or None


def rate(bytes_per_s: float) -> str:
    """Returns a bandwidth as ``muster plan --network`` reads it: ``25GB/s``."""
    value, unit = (bytes_per_s / 1e9, "GB/s") if bytes_per_s >= 1e9 else (bytes_per_s / 1e6, "MB/s")
    return f"{value:.0f}{unit}" if value >= 100 else f"{value:.3g}{unit}"
