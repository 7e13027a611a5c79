"""The nodes of the connected Ray. Here alone are Ray's private tables read."""

from __future__ import annotations

import socket
from collections.abc import Container, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from launcher.capacity import Node

DIAL_S = 1.5
DIALS = 32  # at a time


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
