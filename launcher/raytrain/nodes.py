"""The number of workers that a cluster's nodes can hold: pure functions of the nodes' resources, read from Ray in one
place.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Container, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from trainer.recipe import ResourcesSection

ACCELERATOR = "accelerator_type:"  # Ray's name for a kind of GPU among a node's resources

DIAL_S = 1.5
DIALS = 32  # at a time


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
    return all(_matches(node.labels.get(name), asked) for name, asked in resources.labels.items())


def _matches(value: str | None, asked: str) -> bool:
    """Returns True if the label matches. Ray's other forms (``!a``, ``in(a,b)``) are left to Ray, which reports what it
    cannot place."""
    return asked.startswith(("!", "in(")) or value == asked


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


def answering(nodes: Iterable[Node], timeout_s: float = DIAL_S) -> list[Node]:
    """Returns the nodes whose Ray accepts a connection: Ray's head needs seconds to notice that a node has gone."""
    live = [node for node in nodes if node.alive]
    with ThreadPoolExecutor(max(1, min(DIALS, len(live)))) as pool:
        return [
            node for node, there in zip(live, pool.map(lambda n: _answers(n, timeout_s), live), strict=True) if there
        ]


def _answers(node: Node, timeout_s: float) -> bool:
    try:
        socket.create_connection((node.address, node.port), timeout_s).close()
    except OSError:
        return False
    return True


def nodes_of_cluster() -> list[Node]:
    """Returns every node that the connected Ray knows of, the lost ones too. May wait for Ray's head for some
    seconds."""
    import ray

    rows = ray.nodes()
    free, draining = _private_tables() or ({row["NodeID"]: row["Resources"] for row in rows}, set())
    return [
        Node(
            id=row["NodeID"],
            host=row["NodeManagerHostname"],
            address=row["NodeManagerAddress"],
            alive=row["Alive"],
            total=dict(row["Resources"]),
            free=dict(free.get(row["NodeID"], {})),
            labels=dict(row.get("Labels") or {}),
            draining=row["NodeID"] in draining,
            lost=" ".join(str(row.get("DeathReasonMessage") or "").split()),
            port=row["NodeManagerPort"],
        )
        for row in rows
    ]


def _private_tables() -> tuple[Mapping[str, Mapping[str, float]], Container[str]] | None:
    """Returns the free resources of each node, and the nodes that will be taken away. Ray has no public call for them;
    without them (None), every node counts as free, and a start that finds no room is tried again."""
    try:
        from ray._private import state

        return state.available_resources_per_node(), state.state.get_draining_nodes()
    except (ImportError, AttributeError):
        return None


def end_times() -> dict[str, float]:
    """Returns the Unix time in seconds at which each dead node ended, by node id; nothing where Ray does not say."""
    found: dict[str, float] = {}
    with suppress(Exception):  # Ray has no public call for this, and the private one may change
        from ray._private import worker

        client: Any = worker.global_worker.gcs_client  # type: ignore[attr-defined]
        for node_id, info in client.get_all_node_info(timeout=5).items():
            if info.end_time_ms:
                found[node_id.hex()] = info.end_time_ms / 1000
    return found
