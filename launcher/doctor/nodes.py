"""The nodes of the cluster, as Ray lists them and as they answer."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from launcher.doctor.observations import NodeObservation
from launcher.raytrain.nodes import end_times

DIAL_S = 2.5
_AT_ONCE = 128
_ON_PURPOSE = (1, 3, 4)  # Ray's NodeDeathInfo: EXPECTED_TERMINATION, AUTOSCALER_DRAIN_PREEMPTED, …_IDLE


def read_nodes() -> tuple[list[NodeObservation], dict[str, int]]:
    """Returns all nodes that Ray lists, also dead ones, and the port of each node id. Dials each live node once."""
    import ray

    def head_first(entry: Mapping[str, Any]) -> tuple[bool, list[str]]:
        parts = entry["NodeManagerAddress"].split(".")
        # Padded parts put 10.0.0.9 before 10.0.0.10.
        return "node:__internal_head__" not in entry["Resources"], [part.rjust(3) for part in parts]

    listed = sorted(ray.nodes(), key=head_first)
    ended = end_times()
    nodes = [_node(entry, ended) for entry in listed]
    ports = {entry["NodeID"]: int(entry["NodeManagerPort"]) for entry in listed}
    return dial(nodes, ports), ports


def _node(entry: Mapping[str, Any], ended: Mapping[str, float]) -> NodeObservation:
    reason, end = entry.get("DeathReason", 0), ended.get(entry["NodeID"])
    return NodeObservation(
        node_id=entry["NodeID"],
        hostname=entry["NodeManagerHostname"],
        address=entry["NodeManagerAddress"],
        alive=entry["Alive"],
        reason="" if entry["Alive"] else " ".join(str(entry.get("DeathReasonMessage", "")).split()),
        expected=reason in _ON_PURPOSE,
        dead_for_s=None if entry["Alive"] or end is None else max(0.0, time.time() - end),
    )


def dial(nodes: Sequence[NodeObservation], ports: Mapping[str, int]) -> list[NodeObservation]:
    """Connects once to each node that Ray lists as alive, and returns all nodes with the result.

    Ray may need 30 s or more to notice that a host is cut off; a connection fails within ``DIAL_S``.
    """

    def answered(node: NodeObservation) -> NodeObservation:
        if not node.alive:
            return node
        try:
            socket.create_connection((node.address, ports[node.node_id]), DIAL_S).close()
        except OSError as error:
            return replace(node, answers=False, reason=error.strerror or str(error) or "no answer")
        return replace(node, answers=True)

    with ThreadPoolExecutor(min(_AT_ONCE, max(1, len(nodes)))) as pool:
        return list(pool.map(answered, nodes))
