"""How many workers the nodes of a cluster hold, and what is missing for those that a recipe asks for. Without Ray."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from trainer.errors import InputError, Interrupted, StartAgain
from trainer.recipe import Recipe, ResourcesSection

ACCELERATOR = "accelerator_type:"  # Ray's name for a kind of GPU among a node's resources
RESOURCE_WAIT_S = 40.0
JOIN_WAIT_S = 300.0  # for nodes that a scheduler has given already: a slow file system may hold Ray up on them
POLL_S = 1.0


@dataclass(frozen=True)
class Node:
    """``total`` and ``free``: Ray's resources by name (CPUs and GPUs in pieces). ``draining``: the node will be taken
    away, and Ray places nothing new on it. ``lost``: why a node is gone. Ray's daemon listens on ``port``.
    ``serves``: a server of this run is there."""

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
    serves: bool = False

    def __str__(self) -> str:
        return f"{self.host} ({self.address})"


@dataclass(frozen=True)
class Servers:
    """The inference servers that a run places next to its workers (`rollout.vllm.servers`). ``each``: the resources of
    one by Ray's names; a server cannot be split over two nodes."""

    count: int = 0
    each: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, recipe: Recipe) -> Servers:
        """A server has as many CPUs as a worker, and GPUs if the workers have some."""
        rollout, resources = recipe.rollout, recipe.resources
        gpus = rollout.vllm.tensor_parallel if resources.gpus_per_worker else 0
        need = {"CPU": float(resources.cpus_per_worker), "GPU": float(gpus)}
        return cls(rollout.servers_beside, {name: amount for name, amount in need.items() if amount})

    @property
    def bundles(self) -> list[dict[str, float]]:
        """The resources of each server."""
        return [dict(self.each)] * self.count


NO_SERVERS = Servers()


def each(resources: ResourcesSection) -> dict[str, float]:
    """Returns the resources of one worker by Ray's names, without those that it does not use."""
    need = {"CPU": float(resources.cpus_per_worker), "GPU": float(resources.gpus_per_worker)}
    return {name: amount for name, amount in need.items() if amount}


def wanted(resources: ResourcesSection, servers: Servers = NO_SERVERS) -> dict[str, float]:
    """The least that the recipe's workers and servers need together."""
    need, beside = each(resources), servers.each if servers.count else {}
    return {
        name: need.get(name, 0.0) * resources.min_workers + beside.get(name, 0.0) * servers.count
        for name in {**need, **beside}
    }


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
    return _times(each(resources), have)


def _times(need: Mapping[str, float], have: Mapping[str, float]) -> int:
    return min(math.floor(have.get(name, 0.0) / amount + 1e-9) for name, amount in need.items())


@dataclass(frozen=True)
class Arrangement:
    """``servers``: how many each node gets, in the nodes' order; ``workers``: how many fit next to them."""

    workers: int
    servers: tuple[int, ...]


def arrange(resources: ResourcesSection, servers: Servers, have: Sequence[Mapping[str, float]]) -> Arrangement | None:
    """Returns where servers leave room for the most workers, as early in the order of the nodes as that allows; None if
    the nodes do not hold all of the servers. ``have``: the resources of each node."""
    most_workers = [0] + [-1] * servers.count  # on the nodes so far, by the number of their servers; -1: impossible
    choices: list[list[int]] = []
    for node in have:
        beside = list(_beside(resources, servers, node))
        before, most_workers = most_workers, [-1] * (servers.count + 1)
        choice = [0] * (servers.count + 1)
        for count in range(servers.count + 1):
            for here, workers in enumerate(beside[: count + 1]):
                if before[count - here] >= 0 and before[count - here] + workers > most_workers[count]:
                    most_workers[count], choice[count] = before[count - here] + workers, here
        choices.append(choice)
    if most_workers[servers.count] < 0:
        return None
    left, chosen = servers.count, []
    for choice in reversed(choices):
        chosen.append(choice[left])
        left -= chosen[-1]
    return Arrangement(most_workers[servers.count], tuple(reversed(chosen)))


def _beside(resources: ResourcesSection, servers: Servers, have: Mapping[str, float]) -> Iterator[int]:
    """Yields the workers that a node holds next to 0 servers, 1 server, and so on."""
    for count in range(min(servers.count, _times(servers.each, have)) + 1 if servers.count else 1):
        taken = {name: count * servers.each.get(name, 0.0) for name in have}
        yield places(resources, {name: amount - taken[name] for name, amount in have.items()})


def workers_that_fit(resources: ResourcesSection, nodes: Iterable[Node], servers: Servers = NO_SERVERS) -> int:
    """Returns the number of workers next to all ``servers``, by the nodes' total resources, whoever uses them now."""
    found = arrange(resources, servers, [node.total for node in nodes if suits(resources, node)])
    return found.workers if found else 0


def room(
    resources: ResourcesSection, nodes: Iterable[Node], held: Mapping[str, int], servers: Servers = NO_SERVERS
) -> int:
    """How many workers the run could have now: what is free, and what its own ``held`` workers (by node id) take.
    ``servers``: those that have to be placed too; not those that run."""
    mine = each(resources)
    found = arrange(
        resources,
        servers,
        [
            {
                name: node.free.get(name, 0.0) + held.get(node.id, 0) * mine.get(name, 0.0)
                for name in {**mine, **servers.each}
            }
            for node in nodes
            if suits(resources, node)
        ],
    )
    return found.workers if found else 0


def check_resources(
    resources: ResourcesSection,
    nodes: Callable[[], Sequence[Node]],
    *,
    servers: Servers = NO_SERVERS,
    timeout_s: float = RESOURCE_WAIT_S,
    expected_nodes: int = 0,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Waits (an autoscaler may be adding nodes) until the cluster can hold the minimum number of workers next to the
    ``servers``, and for up to ``JOIN_WAIT_S`` until the ``expected_nodes`` have joined or it can hold the maximum.

    Raises InputError with what is missing, StartAgain if nodes of the job did not come up.
    """
    began = clock()
    while True:
        found = [node for node in nodes() if node.alive]
        fit, waited = workers_that_fit(resources, found, servers), clock() - began
        joining = len(found) < expected_nodes
        if fit >= resources.max_workers or (fit >= resources.min_workers and not (joining and waited < JOIN_WAIT_S)):
            return
        if stopped():
            raise Interrupted("stopped while waiting for the cluster's resources")
        if joining and waited >= JOIN_WAIT_S:
            absent = f"{len(found)} of {expected_nodes} nodes came up within {JOIN_WAIT_S:.0f} s"
            raise StartAgain(f"{absent}: {missing(resources, found, servers)}")
        if not joining and waited >= timeout_s:
            raise InputError(missing(resources, found, servers))
        sleep(POLL_S)


def missing(resources: ResourcesSection, nodes: Sequence[Node], servers: Servers = NO_SERVERS) -> str:
    """Returns what the live nodes lack for the minimum number of workers next to the servers, and what to do."""
    need, suitable = wanted(resources, servers), [node for node in nodes if suits(resources, node)]
    have = {name: sum(node.total.get(name, 0.0) for node in suitable) for name in need}
    lacking = {name: need[name] - have[name] for name in need if need[name] > have[name]}
    if lacking:
        absent = f"missing: {_amounts(lacking)}"
    else:
        short = servers.count > 0 and _placed(servers, suitable) < servers.count
        absent = f"enough in all, but no single node has enough for one more {'server' if short else 'worker'}"
    there = _many(len(nodes), "node")
    if len(suitable) != len(nodes):
        there = f"{len(suitable)} of {there}, those of the asked accelerator_type and labels"
    beside, fit = "", f"{workers_that_fit(resources, nodes, servers)}"
    if servers.count:
        beside = f", rollout.vllm.servers for {_many(servers.count, 'server')} with {_amounts(servers.each)} each"
        fit = f"{_placed(servers, suitable)} servers and {fit} workers"
    return (
        f"resources.workers asks for {_many(resources.min_workers, 'worker')} with {_amounts(each(resources))} each"
        f"{beside}, and the cluster has room for {fit} ({there} with {_amounts(have)} in all; {absent}): add nodes, or "
        f"lower {' or '.join(_to_lower(resources, servers))}"
    )


def _placed(servers: Servers, nodes: Iterable[Node]) -> int:
    """Returns how many of the servers the nodes hold."""
    return min(servers.count, sum(_times(servers.each, node.total) for node in nodes))


def _to_lower(resources: ResourcesSection, servers: Servers) -> Iterator[str]:
    """The settings that can be lowered at all."""
    if resources.min_workers > 1:
        yield "resources.workers"
    if servers.count:
        yield "rollout.vllm.servers (null places them on the training's GPUs)"
    if servers.each.get("GPU", 0.0) > 1:
        yield "rollout.vllm.tensor_parallel"
    if resources.gpus_per_worker:
        yield "resources.gpus_per_worker (0 trains on CPUs)"
    if resources.cpus_per_worker > 1:
        yield "resources.cpus_per_worker"


def _amounts(amounts: Mapping[str, float]) -> str:
    return " and ".join(_many(amount, name) for name, amount in amounts.items())


def _many(count: float, noun: str) -> str:
    return f"{count:g} {noun}" + ("" if count == 1 else "s")
