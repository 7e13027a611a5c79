"""The process that uses Ray for the driver (`launcher.child`): Ray ends a process whose head or node has gone."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from launcher.capacity import Node, Servers
from launcher.raytrain.environment import Environment
from launcher.raytrain.nodes import answering, nodes_of_cluster
from launcher.raytrain.session import connect
from launcher.raytrain.tasks import ray_map
from trainer.recipe import ResourcesSection
from trainer.worker.job import Job

END = ("no more results",)


class RayServer:
    """Its methods are called from the driver, several at a time."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        """``variables``: `cluster.env`."""
        self._variables, self._joined = variables, False
        self._environment = Environment.current(variables)
        self._maps: dict[int, tuple[Iterator[Any], threading.Event]] = {}
        self._numbers = itertools.count()
        self._serving: frozenset[str] = frozenset()

    def connect(self, address: str | None, resources: ResourcesSection, servers: Servers) -> None:
        connect(address, resources, servers)
        self._joined = address is not None

    def prepare(self) -> None:
        """Imports Ray Train, which takes more than a second."""
        import launcher.raytrain.fit  # noqa: F401

    def nodes(self) -> list[Node]:
        """Returns the nodes that answer now."""
        return answering(nodes_of_cluster())

    def all_nodes(self) -> list[Node]:
        return [replace(node, serves=node.id in self._serving) for node in nodes_of_cluster()]

    def request(self, bundles: list[dict[str, float]]) -> None:
        from ray.autoscaler.sdk import request_resources

        request_resources(bundles=bundles)

    def begin_map(self, task: Callable[[Any], Any], jobs: Sequence[Any], beside: ResourcesSection | None) -> int:
        """Returns the number of a map over Ray's tasks, for `next_result` and `end_map`."""
        number, stopped = next(self._numbers), threading.Event()
        self._maps[number] = ray_map(self._environment, beside, stopped.is_set)(task, jobs), stopped
        return number

    def next_result(self, number: int) -> Any:
        """Returns the next result in the jobs' order, or ``END``."""
        return next(self._maps[number][0], END)

    def end_map(self, number: int) -> None:
        """Tasks in flight are cancelled."""
        self._maps[number][1].set()

    def fit(self, job: Job, workers: int) -> None:
        """Trains an attempt, with its servers next to it. Raises ResizeRequested or AttemptFailed."""
        from launcher.raytrain.fit import fit
        from launcher.raytrain.rollout_servers import placed_servers

        # The processes of a Ray of this machine's own have the driver's environment.
        variables = self._variables if self._joined else {}
        with placed_servers(job, self.nodes, self._environment, variables) as servers:
            self._serving = servers.nodes
            fit(job, workers, servers.environment, variables, servers.explained)

    def leave(self) -> None:
        """Leaves the cluster, which then sees the job as ended."""
        import ray

        ray.shutdown()
