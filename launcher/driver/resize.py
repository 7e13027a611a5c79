"""A run on nodes that come and go: how many workers it has, and when it is resized.

Ray Train's elasticity ends workers without a chance to save. Here the driver requests a resize through the run's
lease: the workers commit a checkpoint, end, and start again on the nodes that are there then.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from launcher.capacity import NO_SERVERS, Node, Servers, room, workers_that_fit
from trainer.errors import MusterError, StartAgain
from trainer.recipe import ResourcesSection
from trainer.run.events import EndEvent, FailureEvent, ResizeEvent, StartEvent
from trainer.run.jsonl import events_backwards
from trainer.storage import Storage

log = logging.getLogger(__name__)

LOOK_S = 2.0
OVER = (FailureEvent, ResizeEvent, EndEvent)
RESIZE_S = 30.0
"""Seconds that a group of workers trains at least before it is resized to grow; doubled each time in vain."""
LONGEST_RESIZE_S = 3600.0
LOST_PATIENCE_S = 300.0
"""Seconds without room for the least number of workers before the run ends, to be started again."""
LOST_PATIENCE_IN_JOB_S = 60.0
"""The same inside a job whose nodes were all given at its start: others come with the next start only."""


@dataclass(frozen=True)
class CurrentWorkers:
    """The workers of the newest attempt: one host name each; ``since`` is unix s."""

    attempt: int
    hosts: tuple[str, ...]
    since: float


@dataclass(frozen=True)
class Resize:
    """The reason for a resize."""

    reason: str


@dataclass(frozen=True)
class Lost:
    """The reason why the run cannot continue on the nodes that are left."""

    reason: str


class ResizePolicy:
    """Decides from one look at the nodes after another; has no side effects.

    ``missing`` returns what the live nodes lack; the number of workers is a multiple of ``multiple``. ``servers`` run
    next to the workers, and hold what they need until the attempt ends. ``group`` is called only if necessary, since it
    reads the storage.
    """

    def __init__(
        self,
        resources: ResourcesSection,
        missing: Callable[[Sequence[Node]], str],
        patience_s: float = LOST_PATIENCE_S,
        multiple: int = 1,
        servers: Servers = NO_SERVERS,
    ) -> None:
        self._resources, self._missing, self._patience_s = resources, missing, patience_s
        self._multiple, self._servers = multiple, servers
        self._short_since: float | None = None
        self._left: set[str] = set()
        self._room_seen = False
        self._grown_from: CurrentWorkers | None = None
        self._resize_s = RESIZE_S

    def look(
        self, nodes: Sequence[Node], group: Callable[[], CurrentWorkers | None], now: float
    ) -> Resize | Lost | None:
        """``now`` is unix s."""
        return self._lost(nodes, now) or self._leaving(nodes, group) or self._growing(nodes, group, now)

    def _lost(self, nodes: Sequence[Node], now: float) -> Lost | None:
        if workers_that_fit(self._resources, nodes, self._servers) >= self._resources.min_workers:
            self._short_since = None
            return None
        self._short_since = self._short_since or now
        if now - self._short_since < self._patience_s:
            return None
        gone = [f"{node}: {node.lost or 'lost'}" for node in nodes if not node.alive]
        lost = f"lost {'; '.join(gone)}. " if gone else ""
        return Lost(lost + self._missing([node for node in nodes if node.alive]))

    def _leaving(self, nodes: Sequence[Node], group: Callable[[], CurrentWorkers | None]) -> Resize | None:
        new = [node for node in nodes if node.alive and node.draining and node.id not in self._left]
        if not new or (now_training := group()) is None:
            return None
        self._left |= {node.id for node in new}
        ours = [str(node) for node in new if node.host in now_training.hosts or node.serves]
        return Resize(f"{', '.join(ours)} will be taken away") if ours else None

    def _growing(self, nodes: Sequence[Node], group: Callable[[], CurrentWorkers | None], now: float) -> Resize | None:
        resources = self._resources
        more = room(resources, nodes, {}) if resources.min_workers < resources.max_workers else 0
        more -= more % self._multiple
        seen, self._room_seen = self._room_seen, more > 0
        if not (seen and more) or (training := group()) is None:
            return None
        # Runs that are trained together number their attempts each by itself, so that a later one may have a lower one.
        if self._grown_from and training != self._grown_from:
            vain = len(training.hosts) <= len(self._grown_from.hosts)
            self._resize_s = min(2 * self._resize_s, LONGEST_RESIZE_S) if vain else RESIZE_S
            self._grown_from = None
        size = len(training.hosts)
        if size >= resources.max_workers or self._grown_from or now - training.since < self._resize_s:
            return None
        self._grown_from = training
        return Resize(f"there is room for {min(size + more, resources.max_workers)} workers instead of {size}")


class NodeMonitor:
    """Looks at the nodes in a thread of its own, since Ray's head may take its time to answer.

    ``resize(reason)`` is called from there; `check`, from the driver's own thread, raises StartAgain."""

    def __init__(
        self,
        lookout: ResizePolicy,
        nodes: Callable[[], Sequence[Node]],
        group: Callable[[], CurrentWorkers | None],
        resize: Callable[[str], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._lookout, self._nodes, self._group, self._resize, self._clock = lookout, nodes, group, resize, clock
        self._lost: str | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="cluster-watch", daemon=True)

    def check(self) -> None:
        if self._lost is not None:
            raise StartAgain(self._lost)

    def __enter__(self) -> NodeMonitor:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()

    def _work(self) -> None:
        while not self._closed.wait(LOOK_S) and self._lost is None:
            try:
                self._act(self._lookout.look(self._nodes(), self._group, self._clock()))
            except MusterError as error:
                log.warning("the run's storage did not answer a look at its workers: %s", error)
            except Exception:  # Ray's head is away for a while, or for good: then the training's own wait ends
                log.debug("the nodes of the cluster could not be looked at", exc_info=True)

    def _act(self, found: Resize | Lost | None) -> None:
        if isinstance(found, Resize):
            self._resize(found.reason)
        elif isinstance(found, Lost):
            self._lost = found.reason


def newest_group(run: Storage, before: int) -> CurrentWorkers | None:
    """Returns the workers of the run's newest start, if it is of an attempt after ``before``; None if they have failed
    or ended, or if a resize was requested."""
    newest: CurrentWorkers | None = None
    over = 0.0
    for event in events_backwards(run):
        if event.attempt <= before or (newest and event.attempt < newest.attempt):
            break
        if isinstance(event, OVER):
            over = max(over, event.time)
        if isinstance(event, StartEvent) and newest is None:
            newest = CurrentWorkers(event.attempt, event.hosts, event.time)
    return None if newest is None or over >= newest.since else newest
