"""Places probes where the trainer would place its workers, or on every node that answers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from launcher.capacity import ACCELERATOR, NO_SERVERS, Node, Servers, check_resources, each, room
from launcher.doctor.observations import NodeObservation
from launcher.doctor.probe import Probe
from trainer.errors import InputError
from trainer.recipe import ResourcesSection

PLACE_S = 6.0
STRATEGIES = {"pack": "PACK", "spread": "SPREAD"}


@dataclass
class Placed:
    """Probes by rank. ``whole``: one per node, for all its GPUs; ``error``: why the recipe's workers do not fit."""

    actors: list[Any] = field(default_factory=list)
    nodes: list[NodeObservation] = field(default_factory=list)
    whole: bool = True
    error: str | None = None
    _group: Any = None

    def remove(self) -> None:
        """Kills the probes and removes the placement group. Does not wait: a probe on a lost host never answers."""
        import ray
        from ray.util.placement_group import remove_placement_group

        for actor in self.actors:
            with suppress(Exception):
                ray.kill(actor)
        if self._group is not None:
            with suppress(Exception):
                remove_placement_group(self._group)


def place(
    resources: ResourcesSection | None,
    nodes: Sequence[NodeObservation],
    listed: Sequence[Node],
    servers: Servers = NO_SERVERS,
) -> Placed:
    """Starts the probes. ``servers``: those that a run would place next to its workers; they get no probe.

    Without ``resources``: one probe on every node that answers. With them: one where each worker would run, for as many
    workers as fit now. If fewer than ``min_workers`` fit: one on every node, and ``error`` is what is missing.
    """
    answering = [node for node in nodes if node.answers]
    ids = {node.node_id for node in answering}
    there = [node for node in listed if node.id in ids]
    if resources is None:
        return _everywhere(answering)
    try:
        check_resources(resources, lambda: there, servers=servers, timeout_s=0.0)
    except InputError as error:
        return _everywhere(answering, str(error))
    return _reserved(resources, nodes, there, servers) or _everywhere(answering, _not_placed(resources))


def _everywhere(nodes: Sequence[NodeObservation], error: str | None = None) -> Placed:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def start(node: NodeObservation) -> Any:
        strategy = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
        return ray.remote(Probe).options(num_cpus=0, scheduling_strategy=strategy).remote(whole=True)

    return Placed([start(node) for node in nodes], list(nodes), True, error)


def _reserved(
    resources: ResourcesSection, nodes: Sequence[NodeObservation], there: Sequence[Node], servers: Servers
) -> Placed | None:
    """Reserves the workers' places; returns None if the cluster does not provide them in time."""
    from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

    cut_off = [node.node_id for node in nodes if node.alive and not node.answers]
    # Ray may still list a host that is cut off as alive.
    labels = {**resources.labels, **({"ray.io/node-id": f"!in({','.join(cut_off)})"} if cut_off else {})}
    kind = {f"{ACCELERATOR}{resources.accelerator_type}": 0.001} if resources.accelerator_type else {}
    most = max(resources.min_workers, min(resources.max_workers, room(resources, there, {}, servers)))
    for count in dict.fromkeys((most, resources.min_workers)):
        group = placement_group(
            [{**each(resources), **kind}] * count,
            STRATEGIES[resources.placement],
            bundle_label_selector=[labels] * count,
        )
        if group.wait(PLACE_S):
            break
        remove_placement_group(group)
    else:
        return None
    by_id = {node.node_id: node for node in nodes}
    held: dict[int, str] = placement_group_table(group)["bundles_to_node_id"]
    order = in_order([held[i] for i in range(count)])
    return Placed([_in_bundle(resources, group, i) for i in order], [by_id[held[i]] for i in order], False, None, group)


def in_order(node_ids: Sequence[str]) -> list[int]:
    """Returns bundle indices in rank order: Ray Train gives the bundles of a node consecutive ranks."""
    first = {node_id: i for i, node_id in reversed(list(enumerate(node_ids)))}
    return sorted(range(len(node_ids)), key=lambda i: (first[node_ids[i]], i))


def _in_bundle(resources: ResourcesSection, group: Any, index: int) -> Any:
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
    cpus, gpus = resources.cpus_per_worker, resources.gpus_per_worker
    options = {"num_cpus": cpus, "num_gpus": gpus, "scheduling_strategy": strategy}
    return ray.remote(Probe).options(**options).remote(whole=False)


def _not_placed(resources: ResourcesSection) -> str:
    kind = f" of accelerator type {resources.accelerator_type}" if resources.accelerator_type else ""
    labels = f" on nodes with labels {dict(resources.labels)}" if resources.labels else ""
    return (
        f"the cluster did not give {resources.min_workers} workers{kind}{labels} their CPUs and GPUs within "
        f"{PLACE_S * 2:g} s: other jobs hold them, or no node is of that kind; see `ray status`"
    )
