"""Ray as the place where attempts run: a cluster that is joined, or a Ray of this machine's own.

Ray itself is used in a child process, whose end is one failure among others.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import ExitStack
from functools import partial
from typing import Any

from launcher.capacity import RESOURCE_WAIT_S, Node, Servers, check_resources, each
from launcher.child import Child, ChildEnded
from launcher.raytrain.server import END, RayServer
from launcher.raytrain.session import not_started, session_folder
from trainer.data.prepare.executor import Map
from trainer.errors import Interrupted, MusterError, StartAgain
from trainer.recipe import Recipe, ResourcesSection
from trainer.worker.job import Job

log = logging.getLogger(__name__)

START_S, LEAVE_S = 600.0, 8.0
POLL_S = 0.5
CALLS = 16
"""Calls that Ray's process answers at a time: a fit, two maps, and looks at the nodes that may be slow."""


class RayRunner:
    """Entered, it is connected to Ray. ``address``: of the cluster, None for a Ray of this machine's own."""

    server: type[RayServer] = RayServer

    def __init__(self, recipe: Recipe, address: str | None) -> None:
        self._resources, self._variables, self._address = recipe.resources, recipe.cluster.env, address
        self._servers, self._asked = Servers.of(recipe), False
        self._exit = ExitStack()

    def __enter__(self) -> RayRunner:
        wanted, cores = self._resources.max_workers * self._resources.cpus_per_worker, os.cpu_count() or 1
        if self._address is None and wanted > cores:
            crowd = "%d workers of %d CPUs run on %d cores: slower, with the same result"
            log.warning(crowd, self._resources.max_workers, self._resources.cpus_per_worker, cores)
        with ExitStack() as entered:
            if self._address is None:
                entered.enter_context(session_folder())
            self._ray = Child(partial(self.server, self._variables), "muster-ray", CALLS, self._told)
            entered.callback(self._leave)
            connected = self._ray.submit("connect", self._address, self._resources, self._servers)
            if not wait([connected], START_S).done:
                raise not_started(f"it has not answered within {START_S / 60:g} minutes")
            try:
                connected.result()
            except ChildEnded as error:
                raise not_started(str(error)) from error
            self._ray.submit("prepare")
            self._exit = entered.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._exit.close()

    def _leave(self) -> None:
        if self._address is not None:
            calls = [self._ray.submit("request", [])] if self._asked else []
            wait([*calls, self._ray.submit("leave")], LEAVE_S)
        self._ray.kill()

    def _told(self, text: str) -> None:
        """Gets each text that Ray's process passes on."""

    def nodes(self) -> list[Node]:
        return self._looked("nodes")

    def all_nodes(self) -> list[Node]:
        return self._looked("all_nodes")

    def _looked(self, method: str) -> list[Node]:
        try:
            found: list[Node] = self._call(method)
        except MusterError:
            raise
        except Exception:
            log.exception("the cluster's nodes could not be looked at")
            return []
        return found

    def await_resources(self, expected_nodes: int, stopped: Callable[[], bool]) -> None:
        """See `check_resources`. Nobody adds anything to a Ray of this machine's own."""
        joined = self._address is not None
        timeout_s = RESOURCE_WAIT_S if joined else 0.0
        nodes = expected_nodes if joined else 0
        check_resources(
            self._resources,
            self.all_nodes,
            servers=self._servers,
            timeout_s=timeout_s,
            expected_nodes=nodes,
            stopped=stopped,
        )

    def ask_for(self, workers: int) -> None:
        if self._address is not None and not self._asked:
            self._asked = True
            self._ray.submit("request", [each(self._resources)] * workers + self._servers.bundles)

    def map(self, stopped: Callable[[], bool]) -> Map:
        return self._mapped(None, stopped)

    def map_beside(self, stopped: Callable[[], bool]) -> Map:
        return self._mapped(self._resources, stopped)

    def _mapped(self, beside: ResourcesSection | None, stopped: Callable[[], bool]) -> Map:
        def run(task: Callable[[Any], Any], jobs: Sequence[Any]) -> Iterator[Any]:
            if len(jobs) <= 1:
                yield from map(task, jobs)
                return
            number = self._call("begin_map", task, jobs, beside)
            try:
                while (result := self._call("next_result", number, stopped=stopped)) != END:
                    yield result
            finally:
                self._ray.submit("end_map", number)

        return run

    def start(self, job: Job, workers: int) -> RayAttempt:
        return RayAttempt(self._ray.submit("fit", job, workers), self._gone)

    def _call(self, method: str, *arguments: Any, stopped: Callable[[], bool] = lambda: False) -> Any:
        """Raises Interrupted once ``stopped()``, and StartAgain if Ray has gone."""
        future = self._ray.submit(method, *arguments)
        while not wait([future], POLL_S).done:
            if stopped():
                raise Interrupted("stopped while data was being prepared")
        try:
            return future.result()
        except ChildEnded as ended:
            raise self._gone() from ended

    def _gone(self) -> StartAgain:
        where = f"the Ray cluster at {self._address}" if self._address else "this machine's Ray"
        return StartAgain(
            f"{where} has gone: its head, or its daemon on this machine, has ended; the same command resumes from the "
            "newest checkpoint once it is up"
        )


class RayAttempt:
    """One ``fit()`` in the process that uses Ray."""

    def __init__(self, outcome: Future[None], gone: Callable[[], StartAgain]) -> None:
        self._outcome, self._gone = outcome, gone

    def wait(self, timeout_s: float) -> bool:
        return bool(wait([self._outcome], timeout_s).done)

    def result(self) -> None:
        try:
            self._outcome.result()
        except ChildEnded as ended:
            raise self._gone() from ended
