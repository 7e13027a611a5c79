"""The nodes of replicas: on which nodes the ranks of each one are, and a warning where replicas share nodes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from trainer.recipe.strategies import Mesh

if TYPE_CHECKING:
    from trainer.recipe.root import Recipe


def replica_nodes(mesh: Mesh, nodes: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Returns the nodes of each replica, from the node of each rank; nothing if replicas hold one rank each, or if
    there is only one."""
    each = mesh.ranks_per_replica
    if mesh.replicas == 1 or each == 1:
        return ()
    return tuple(tuple(dict.fromkeys(nodes[first : first + each])) for first in range(0, mesh.ranks, each))


def share_nodes(placed: Sequence[Sequence[str]]) -> bool:
    """Returns True if a replica has several nodes, and another replica is on one of them as well. ``placed``: the
    nodes of each replica."""
    held = Counter(node for nodes in placed for node in set(nodes))
    return any(len(set(nodes)) > 1 and any(held[node] > 1 for node in nodes) for nodes in placed)


def fits_nodes(ranks_per_replica: int, per_node: int) -> bool:
    """Returns True if nodes of ``per_node`` ranks hold complete replicas, or replicas have complete nodes."""
    return per_node % ranks_per_replica == 0 or ranks_per_replica % per_node == 0


def advice(mesh: Mesh, per_node: int) -> str:
    """Returns what to change where replicas share nodes of ``per_node`` ranks.

    Only fewer replicas are suggested: with more of them, each rank would keep more of the model."""
    fewer = (n for n in range(mesh.replicas - 1, 0, -1) if mesh.ranks % n == 0)
    suitable = (n for n in fewer if (mesh.ranks // n) % mesh.context == 0)
    replicas = next(n for n in suitable if n == 1 or fits_nodes(mesh.ranks // n, per_node))
    return (
        f"set strategy.replicas to {replicas}, or give each node a divisor or a multiple of {mesh.ranks_per_replica} "
        "workers"
    )


def placement_text(mesh: Mesh, nodes: Sequence[str]) -> str:
    """Returns on how many nodes replicas are, and what to change if they share some; '' if `replica_nodes` is empty.
    ``nodes``: the node of each rank."""
    placed = replica_nodes(mesh, nodes)
    if not placed:
        return ""
    if share_nodes(placed):
        per_node = max(Counter(nodes).values())
        return f"{mesh.replicas} replicas that share nodes, which is slow ({advice(mesh, per_node)})"
    if len(set(nodes)) == 1:
        return f"{mesh.replicas} replicas on one node"
    least, most = min(map(len, placed)), max(map(len, placed))
    counts = "one node" if most == 1 else f"{most} nodes" if least == most else f"{least} to {most} nodes"
    return f"{mesh.replicas} replicas, each on {counts}"


def placement_warning(recipe: Recipe, ranks: int, per_node: int) -> str | None:
    """Returns a warning if replicas would share nodes of ``per_node`` workers; None if each has its own."""
    if recipe.strategy.replicas == 1 or ranks % recipe.strategy.context_parallel:
        return None
    mesh = Mesh.of(recipe, ranks)
    if mesh.replicas == 1 or fits_nodes(mesh.ranks_per_replica, per_node):
        return None
    return (
        f"strategy.replicas is {mesh.replicas}, so that {mesh.ranks_per_replica} of {ranks} workers are a replica, and "
        f"a node has {per_node}: replicas share nodes, and exchange parameters between nodes; {advice(mesh, per_node)}"
    )
