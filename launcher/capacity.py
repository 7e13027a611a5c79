"""How many workers the nodes of a cluster hold, and what is missing for those that a recipe asks for. Without Ray."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from trainer.errors import InputError, Interrupted, StartAgain
from trainer.recipe import ResourcesSection

ACCELERATOR = "accelerator_type:"  # Ray's name for a kind of GPU among a node's resources
RESOURCE_WAIT_S = 40.0
JOIN_WAIT_S = 300.0  # for nodes that a scheduler has given already: a slow file system may hold Ray up on them
POLL_S = 1.0


@dataclass(frozen=True)
class Node:
    """``total`` and ``free``: Ray's resources by name (CPUs and GPUs in pieces). ``draining``: the node will be taken
    away, and Ray places nothing new on it. ``lost``: why a node is gone. Ray's daemon listens on ``port``."""

    id: str
    host: str
    address: str
    alive: bool
    total: Mapping[str, float]
    free: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    draining: bool = False
    lost: str = ""
    port: int = 0

    def __str__(self) -> str:
        return f"{self.host} ({self.address})"


def each(resources: ResourcesSection) -> dict[str, float]:
    """Returns the resources of one worker by Ray's names, without those that it does not use."""
    need = {"CPU": float(resources.cpus_per_worker), "GPU": float(resources.gpus_per_worker)}
    return {name: amount for name, amount in need.items() if amount}


def wanted(resources: ResourcesSection) -> dict[str, float]:
    """The least that the recipe's workers need together."""
    return {name: amount * resources.min_workers for name, amount in each(resources).items()}


def suits(resources: ResourcesSection, node: Node) -> bool:
    """Returns True if a worker may run on the node: it has the requested kind of GPU and labels, and is not
    draining."""
    kind = resources.accelerator_type
    if not node.alive or node.draining or (kind and f"{ACCELERATOR}{kind}" not in node.total):
        return False
    # Ray's other forms of a label (``!a``, ``in(a,b)``) are left to Ray, which reports what it cannot place.
    plain = {name: asked for name, asked in resources.labels.items() if not asked.startswith(("!", "in("))}
    return all(node.labels.get(name) == asked for name, asked in plain.items())


def places(resources: ResourcesSection, have: Mapping[str, float]) -> int:
    """How many workers these resources of one node hold: a worker cannot be split over two nodes."""
    return min(math.floor(have.get(name, 0.0) / amount + 1e-9) for name, amount in each(resources).items())


def workers_that_fit(resources: ResourcesSection, nodes: Iterable[Node]) -> int:
    """Returns the number of workers by the nodes' total resources, whoever uses them now."""
    return sum(places(resources, node.total) for node in nodes if suits(resources, node))


def room(resources: ResourcesSection, nodes: Iterable[Node], held: Mapping[str, int]) -> int:
    """How many workers the run could have now: what is free, and what its own ``held`` workers (by node id) take."""
    mine = each(resources)
    count = 0
    for node in nodes:
        if suits(resources, node):
            own = held.get(node.id, 0)
            count += places(resources, {name: node.free.get(name, 0.0) + own * mine[name] for name in mine})
    return count


def check_resources(
    resources: ResourcesSection,
    nodes: Callable[[], Sequence[Node]],
    *,
    timeout_s: float = RESOURCE_WAIT_S,
    expected_nodes: int = 0,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Waits (an autoscaler may be adding nodes) until the cluster can hold the minimum number of workers, and for up to
    ``JOIN_WAIT_S`` until the ``expected_nodes`` have joined or it can hold the maximum.

    Raises InputError with what is missing, StartAgain if nodes of the job did not come up.
    """
    began = clock()
    while True:
        found = [node for node in nodes() if node.alive]
        fit, waited, joining = workers_that_fit(resources, found), clock() - began, len(found) < expected_nodes
        if fit >= resources.max_workers or (fit >= resources.min_workers and not (joining and waited < JOIN_WAIT_S)):
            return
        if stopped():
            raise Interrupted("stopped while waiting for the cluster's resources")
        if joining and waited >= JOIN_WAIT_S:
            absent = f"{len(found)} of {expected_nodes} nodes came up within {JOIN_WAIT_S:.0f} s"
            raise StartAgain(f"{absent}: {missing(resources, found)}")
        if not joining and waited >= timeout_s:
            raise InputError(missing(resources, found))
        sleep(POLL_S)


def missing(resources: ResourcesSection, nodes: Sequence[Node]) -> str:
    """Returns what the live nodes lack for the minimum number of workers, and what to do."""
    need, suitable = wanted(resources), [node for node in nodes if suits(resources, node)]
    have = {name: sum(node.total.get(name, 0.0) for node in suitable) for name in need}
    lacking = {name: need[name] - have[name] for name in need if need[name] > have[name]}
    if lacking:
        absent = f"missing: {_amounts(lacking)}"
    else:
        absent = "enough in all, but no single node has enough for one more worker"
    there = _many(len(nodes), "node")
    if len(suitable) != len(nodes):
        there = f"{len(suitable)} of {there}, those of the asked accelerator_type and labels"
    return (
        f"resources.workers asks for {_many(resources.min_workers, 'worker')} with {_amounts(each(resources))} each, "
        f"and the cluster has room for {workers_that_fit(resources, nodes)} ({there} with {_amounts(have)} in all; "
        f"{absent}): add nodes, or lower {' or '.join(_to_lower(resources))}"
    )


def _to_lower(resources: ResourcesSection) -> Iterator[str]:
    """The settings that can be lowered at all."""
    if resources.min_workers > 1:
        yield "resources.workers"
    if resources.gpus_per_worker:
        yield "resources.gpus_per_worker (0 trains on CPUs)"
    if resources.cpus_per_worker > 1:
        yield "resources.cpus_per_worker"


def _amounts(amounts: Mapping[str, float]) -> str:
    return " and ".join(_many(amount, name) for name, amount in amounts.items())


def _many(count: float, noun: str) -> str:
    return f"{count:g} {noun}" + ("" if count == 1 else "s")
