"""Ray as the place where attempts run: a cluster that is joined, or a Ray of this machine's own."""

from __future__ import annotations

import importlib
import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from typing import TYPE_CHECKING

from launcher.capacity import RESOURCE_WAIT_S, Node, check_resources, each
from launcher.raytrain.environment import Environment
from launcher.raytrain.nodes import answering, nodes_of_cluster
from launcher.raytrain.session import quiet_logs, ray_session
from launcher.raytrain.tasks import ray_map
from trainer.data.prepare.executor import Map
from trainer.interruption import current
from trainer.recipe import Recipe

if TYPE_CHECKING:
    from launcher.raytrain.fit import Fit
    from trainer.worker.job import Job

log = logging.getLogger(__name__)


class RayRunner:
    """Entered, it is connected to Ray. ``address``: of the cluster, None for a Ray of this machine's own."""

    def __init__(self, recipe: Recipe, address: str | None) -> None:
        self._resources, self._address = recipe.resources, address
        self._environment = Environment.current()
        self._session: AbstractContextManager[None] = ray_session(address, recipe.resources)
        self._asked = False
        self._fit: Fit | None = None

    def __enter__(self) -> RayRunner:
        self._session.__enter__()
        # Ray Train takes more than a second to import, which data is prepared in.
        threading.Thread(target=importlib.import_module, args=("launcher.raytrain.fit",), daemon=True).start()
        quiet_logs()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._asked:
            with suppress(Exception):
                self._request([])
        # Ray ends a process with exit code 1 if it is used after its shutdown, so a `fit` that still waits is left.
        if self._fit is not None and not self._fit.wait(0):
            current.abandon()
        self._session.__exit__(None, None, None)

    def nodes(self) -> list[Node]:
        try:
            return answering(nodes_of_cluster())
        except Exception:
            log.exception("the cluster's nodes could not be looked at")
            return []

    def await_resources(self, expected_nodes: int, stopped: Callable[[], bool]) -> None:
        """See `check_resources`. Nobody adds anything to a Ray of this machine's own."""
        joined = self._address is not None
        timeout_s = RESOURCE_WAIT_S if joined else 0.0
        nodes = expected_nodes if joined else 0
        check_resources(self._resources, nodes_of_cluster, timeout_s=timeout_s, expected_nodes=nodes, stopped=stopped)

    def ask_for(self, workers: int) -> None:
        if self._address is not None and not self._asked:
            self._asked = True
            self._request([each(self._resources)] * workers)

    def _request(self, bundles: list[dict[str, float]]) -> None:
        from ray.autoscaler.sdk import request_resources

        request_resources(bundles=bundles)

    def map(self, stopped: Callable[[], bool]) -> Map:
        """See `ray_map`."""
        return ray_map(self._environment, None, stopped)

    def map_beside(self, stopped: Callable[[], bool]) -> Map:
        """Returns a map whose tasks run beside the workers."""
        return ray_map(self._environment, self._resources, stopped)

    def start(self, job: Job, workers: int) -> Fit:
        from launcher.raytrain.fit import Fit

        self._fit = Fit(job, workers, self._environment)
        return self._fit
