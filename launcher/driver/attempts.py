"""The attempts of a run: how many workers each one gets, what a failure means, and when to give up.

The decisions (`WorkerCount`, `FailureHistory`) have no side effects; `Attempts` acts on them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol, TypeVar

from launcher.attempt import AttemptFailed, ResizeRequested, placed_death
from launcher.capacity import NO_SERVERS, Node, Servers, room, workers_that_fit
from launcher.driver.crash_loop import CrashSignature, in_a_row, is_hopeless
from launcher.driver.failure_advice import advise
from launcher.driver.resize import newest_group
from trainer.checkpoint import list_commits, read_claims
from trainer.checkpoint.publish import is_last
from trainer.data.prepare.executor import Map
from trainer.errors import StartAgain
from trainer.recipe import ResourcesSection
from trainer.run import symptoms
from trainer.run.events import BrokenEvent, Event, HangEvent
from trainer.run.failure import Failure
from trainer.run.jsonl import Events, metrics_backwards, newest_event
from trainer.run.metrics import StepMetrics
from trainer.run.startup_phases import WORKERS, Phases
from trainer.storage import Storage, open_storage
from trainer.worker.job import Job

log = logging.getLogger(__name__)
T = TypeVar("T")

POLL_S = 0.5
PAUSE_S = 0.25
SETTLE_S = 10.0
"""Resources of workers that have just ended may count as used for so long."""
PATIENCE_S = 330.0
"""Seconds that a run waits for resources that others use; the driver's patience for lost nodes is shorter."""
START_FAILURES = 2
"""Failures to start the workers before the run ends."""
READ_S = 20.0
SEEN_WAITS_S = (0.0, 0.25, 0.25, 0.5)
"""Pauses between looks for what the other ranks report about one that has died."""


class Attempt(Protocol):
    """Workers that train one job."""

    def wait(self, timeout_s: float) -> bool:
        """Returns True if it has ended by then."""

    def result(self) -> None:
        """Returns if the workers have ended without an error. Raises ResizeRequested or AttemptFailed."""


class Runner(Protocol):
    """The place where attempts run. It is entered before anything else is called."""

    def __enter__(self) -> Runner: ...
    def __exit__(self, *exc: object) -> None: ...

    def await_resources(self, expected_nodes: int, stopped: Callable[[], bool]) -> None:
        """Waits until there is room for the least number of workers, and for nodes that are known to come. Raises
        InputError with what is missing."""

    def map(self, stopped: Callable[[], bool]) -> Map:
        """Returns a map to prepare data with, which raises Interrupted once ``stopped()``."""

    def map_beside(self, stopped: Callable[[], bool]) -> Map:
        """Returns such a map that leaves the workers their CPUs."""

    def nodes(self) -> Sequence[Node]:
        """Returns the nodes that answer now; none if the cluster does not answer."""

    def all_nodes(self) -> Sequence[Node]:
        """Returns every node that the cluster knows of, the lost ones too."""

    def ask_for(self, workers: int) -> None:
        """Requests nodes for so many workers and for the recipe's servers, where nodes can be added. Does not wait for
        them."""

    def start(self, job: Job, workers: int) -> Attempt: ...


class WorkerCount:
    """Decides how many workers the next attempt gets: as many as there is room for, up to the maximum, and a multiple
    of ``multiple`` (`strategy.context_parallel`). ``servers``: those that the attempt places before its workers."""

    def __init__(
        self, resources: ResourcesSection, now: float, multiple: int = 1, servers: Servers = NO_SERVERS
    ) -> None:
        self._resources, self._since, self._multiple, self._servers = resources, now, multiple, servers

    def decide(self, nodes: Sequence[Node], now: float) -> int | None:
        """Returns the number, or None to look again. ``now`` is in seconds of the clock of ``__init__``. Raises
        StartAgain after ``PATIENCE_S``."""
        resources, waited = self._resources, now - self._since
        count, possible = (
            min(resources.max_workers, workers - workers % self._multiple)
            for workers in (
                room(resources, nodes, {}, self._servers),
                workers_that_fit(resources, nodes, self._servers),
            )
        )
        if count >= resources.min_workers and (count >= possible or waited >= SETTLE_S):
            return count
        if waited >= PATIENCE_S:
            beside = f" beside {self._servers.count} vLLM servers" if self._servers.count else ""
            raise StartAgain(
                f"for {PATIENCE_S:.0f} s there was room for {count} of {resources.min_workers} workers{beside}: other "
                "jobs hold the rest of the cluster's CPUs and GPUs; see `ray status`"
            )
        return None


class FailureHistory:
    """Decides whether a failure is worth another attempt. One that would repeat is not: a fatal cause at once, the same
    error at the same step the third time. Failures before the newest checkpoint do not count any more, since a run on
    machines that come and go may lose some for weeks and still makes progress."""

    def __init__(self, max_failures: int) -> None:
        self._max_failures = max_failures
        self._faults: list[CrashSignature] = []
        self._failures = self._start_failures = self._committed = 0

    def judge(self, failed: AttemptFailed, step: int | None, committed: int) -> tuple[Failure, bool]:
        """Returns the cause, and True if another attempt is worth it. ``step``: the last step in the metrics;
        ``committed``: that of the newest checkpoint, 0 without one."""
        if committed > self._committed:
            self._committed, self._failures, self._start_failures = committed, 0, 0
        cause = failed.cause
        self._faults.append(CrashSignature(step, cause.message))
        if (times := in_a_row(self._faults)) > 1:
            cause = replace(cause, message=f"{cause.message} ({times} times in a row at step {step})")
        if failed.starting:
            self._start_failures += 1
        else:
            self._failures += 1
        allowed = self._failures <= self._max_failures and self._start_failures <= START_FAILURES
        return cause, allowed and not cause.fatal and not is_hopeless(self._faults)


class Attempts:
    """Starts one attempt after another until one ends without a failure. ``stage``: what the run waits for, until the
    first step of an attempt."""

    def __init__(self, runner: Runner, job: Job, phases: Phases) -> None:
        self.stage = ""
        self._runner, self._job, self._phases = runner, job, phases
        self._servers = Servers.of(job.recipe)
        self._history = FailureHistory(job.recipe.resources.max_failures)
        self._since = time.time()

    def run(self, every: Callable[[], None]) -> None:
        """Calls ``every`` each ``POLL_S`` seconds, whose errors end the wait. Raises the first cause of a failure that
        is not worth another attempt."""
        while True:
            workers = self._workers(every)
            first = f"{self._servers.count} vLLM server{'' if self._servers.count == 1 else 's'}, then "
            self.stage = (
                f"starting {first if self._servers.count else ''}{workers} worker{'' if workers == 1 else 's'} and "
                "loading the model"
            )
            self._phases.end(WORKERS)
            job = replace(self._job, spent=self._phases.spent(), asked_at=time.time())
            attempt = self._runner.start(job, workers)
            while not attempt.wait(POLL_S):
                every()
            every()
            try:
                return attempt.result()
            except ResizeRequested:
                pass
            except AttemptFailed as failed:
                self._judge(failed)
            self._phases.restart()

    def _workers(self, every: Callable[[], None]) -> int:
        resources = self._job.recipe.resources
        multiple = self._job.recipe.strategy.context_parallel
        count = WorkerCount(resources, time.monotonic(), multiple, self._servers)
        self.stage = "waiting for CPUs and GPUs"
        while True:
            nodes = self._runner.nodes()
            if room(resources, nodes, {}, self._servers) < resources.max_workers:
                self._runner.ask_for(resources.max_workers)
            if (workers := count.decide(nodes, time.monotonic())) is not None:
                return workers
            every()
            time.sleep(PAUSE_S)

    def _judge(self, failed: AttemptFailed) -> None:
        """Records the failure; raises its cause unless there will be another attempt."""
        recipe = self._job.recipe
        storage = open_storage(self._job.storage, deadline_s=READ_S)
        runs = [storage.child(job.recipe.name) for job in self._job.runs]
        steps = [_tried("the step of the failure", None, partial(last_step, run)) for run in runs]
        commits = [_tried("the run's checkpoints", 0, partial(last_commit, run)) for run in runs]
        step = max((step for step in steps if step is not None), default=None)
        cause = _tried("the run's events", failed.cause, lambda: explained(failed.cause, runs, step, self._since))
        cause, retried = self._history.judge(AttemptFailed(cause, starting=failed.starting), step, sum(commits))
        # Workers that start again do not wait for a plan of what would fit.
        said = symptoms.advise(cause, recipe, runs[0].url) if retried else advise(cause, recipe, runs[0].url)
        for job, run, done in zip(self._job.runs, runs, steps, strict=True):
            if len(runs) == 1 or not _tried("the run's checkpoints", False, partial(is_complete, job, run)):
                event = cause.event(said, retried=retried, driver=job.driver, step=done)
                _tried("the failure", None, partial(record, run, f"driver{job.driver}-controller", event))
        if not retried:
            raise cause.as_error(said) from failed


def record(run: Storage, writer: str, event: Event) -> None:
    """Writes an event of the driver."""
    events = Events(run, read_claims(run).attempt, writer)
    events.emit(event)
    events.close()


def _tried(what: str, otherwise: T, look: Callable[[], T]) -> T:
    """Returns the result; ``otherwise``, with a log entry, if the storage does not answer."""
    try:
        return look()
    except Exception:
        log.exception("%s could not be read or written", what)
        return otherwise


def last_step(run: Storage) -> int:
    """Returns the last step in the run's metrics, 0 before the first."""
    return next((row.step for row in metrics_backwards(run) if isinstance(row, StepMetrics)), 0)


def last_commit(run: Storage) -> int:
    """Returns the step of the newest checkpoint, 0 without one."""
    newest = next(iter(list_commits(run, newest=1)), None)
    return newest.step if newest else 0


def is_complete(job: Job, run: Storage) -> bool:
    """Returns True if the run's last step is committed, which may have come early."""
    newest = next(iter(list_commits(run, newest=1)), None)
    return newest is not None and is_last(newest, job.recipe.training)


def explained(cause: Failure, runs: Sequence[Storage], step: int | None, since: float) -> Failure:
    """Returns the cause with what the events of the runs add, which are trained in the same processes. A group whose
    ranks were ended because one blocked them failed of that; a rank that died did so on a host, and others have seen
    it. ``step``: the last one that a run has done; ``since``: the Unix time in seconds before which no group of this
    driver started."""
    if not cause.by_another:
        return cause
    attempts = [(run, read_claims(run).attempt) for run in runs]
    hangs = (newest_event(run, attempt, HangEvent) for run, attempt in attempts)
    if (hang := next(filter(None, hangs), None)) is not None:
        return cause.of_hang(hang)
    if not cause.died or cause.rank is None:
        return cause
    groups = ((run, group) for run in runs if (group := newest_group(run, 0)) is not None)
    run, group = max(groups, key=lambda found: found[1].since, default=(runs[0], None))
    if group is None or group.since < since or cause.rank >= len(group.hosts):
        return placed_death(cause, None, "", step)
    seen = _seen(run, group.attempt, cause.rank) if len(group.hosts) > 1 else ""
    return placed_death(cause, group.hosts[cause.rank], seen, step)


def _seen(run: Storage, attempt: int, rank: int) -> str:
    """Returns where other ranks last saw a rank that has died; they record it as soon as their collectives break."""
    for wait_s in SEEN_WAITS_S:
        time.sleep(wait_s)
        if (broken := newest_event(run, attempt, BrokenEvent)) is not None:
            return broken.seen.get(str(rank), "")
    return ""
