"""Policies for Ray Train's controller: how many workers to start, and what a failure means.

They replace Ray Train's own policies and run in its controller, in a thread of the driver.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import replace
from typing import Any

from ray.train.v2._internal.execution.context import TrainRunContext
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ScalingDecision
from ray.train.v2._internal.execution.scaling_policy.autoscaling_coordinator_client import (
    TrainAutoscalingCoordinatorClient,
)
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroupPollStatus, WorkerGroupState
from ray.train.v2.api.config import FailureConfig, ScalingConfig
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from launcher.raytrain.crash_loop import CrashSignature, in_a_row, is_hopeless
from launcher.raytrain.environment import Environment
from launcher.raytrain.failure_advice import advise
from launcher.raytrain.failures import first_cause, placed_death, unwrapped
from launcher.raytrain.handoff import JobHandoff
from launcher.raytrain.nodes import Node, answering, nodes_of_cluster, room, workers_that_fit
from launcher.raytrain.scaling import newest_group
from trainer.recipe import Recipe, ResourcesSection
from trainer.run import symptoms
from trainer.run.failure import Failure
from trainer.storage import Storage, open_storage

log = logging.getLogger(__name__)

SEEN_WAITS_S = (0.0, 0.25, 0.25, 0.5)
"""Between looks for what the ranks that are left have to say of one that has died."""


class ResizeRequested(Exception):
    """The workers have committed and ended; they start again on the nodes that are there now."""


class FailurePolicy(DefaultFailurePolicy):
    """Ray Train's own policy, but a failure that would repeat ends the run: a fatal cause at once, the same error at
    the same step the third time. Every failure is recorded in the run's events with its first cause. Workers that
    ended for a resize have not failed."""

    def __init__(self, config: FailureConfig, recipe: Recipe, order: JobHandoff, environment: Environment) -> None:
        super().__init__(config)
        self._recipe, self._order, self._environment = recipe, order, environment
        self._faults: list[CrashSignature] = []
        self._since = time.time()
        self._committed = 0

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        if self._order.left:
            return FailureDecision.RAISE
        if gathered(training_failed_error):
            return FailureDecision.RETRY
        self._environment.apply()
        self._forgive()
        step = self._step()
        cause = self._cause(training_failed_error, step)
        self._faults.append(CrashSignature(step, cause.message))
        if (times := in_a_row(self._faults)) > 1:
            cause = replace(cause, message=f"{cause.message} ({times} times in a row at step {step})")
        hopeless = cause.fatal or is_hopeless(self._faults)
        decision = FailureDecision.RAISE if hopeless else super().make_decision(training_failed_error)
        self._tell(cause, step, retried=decision == FailureDecision.RETRY)
        return decision

    def _tell(self, cause: Failure, step: int | None, *, retried: bool) -> None:
        """Workers that start again do not wait for a plan of what would fit."""
        url = self._run().url
        said = symptoms.advise(cause, self._recipe, url) if retried else advise(cause, self._recipe, url)
        self._order.failed = None if retried else cause.as_error(said)
        try:
            self._record(cause, said, step, retried=retried)
        except Exception:
            log.exception("the failure could not be written to the run's events")

    def _forgive(self) -> None:
        """Failures before the newest checkpoint do not count any more: a run on machines that come and go may lose some
        for weeks, and gets on."""
        from trainer.checkpoint import list_commits

        try:
            newest = max((record.step for record in list_commits(self._run(), newest=1)), default=0)
        except Exception:
            log.exception("the run's checkpoints could not be read")
            return
        if newest > self._committed:
            self._committed = newest
            self._worker_group_failures = self._controller_failures = 0

    def _cause(self, error: BaseException, step: int | None) -> Failure:
        try:
            return explained(cause_of(error), self._run(), step, self._since)
        except Exception:
            log.exception("the run's events could not be read")
            return cause_of(error)

    def _run(self) -> Storage:
        return open_storage(self._recipe.storage, deadline_s=20).child(self._recipe.name)

    def _step(self) -> int | None:
        """Returns the last step in the run's metrics, 0 before the first; None if the storage does not answer."""
        from trainer.run.jsonl import metrics_backwards
        from trainer.run.metrics import StepMetrics

        try:
            rows = metrics_backwards(self._run())
            return next((row.step for row in rows if isinstance(row, StepMetrics)), 0)
        except Exception:
            log.exception("the step of the failure could not be read")
            return None

    def _record(self, cause: Failure, said: str, step: int | None, *, retried: bool) -> None:
        from trainer.checkpoint import read_claims
        from trainer.run.jsonl import Events

        if (job := self._order.job) is None:
            return  # workers that stood by: nothing of the run has begun
        run = self._run()
        events = Events(run, read_claims(run).attempt, f"driver{job.driver}-controller")
        events.emit(cause.event(said, retried=retried, driver=job.driver, step=step))
        events.close()


class NoRoom(Exception):
    """The cluster has the nodes, and others use them."""


class WorkerCountPolicy(ElasticScalingPolicy):
    """Starts as many workers as there is room for now, and waits while there is room for too few; growth is decided by
    the driver (`launcher.raytrain.scaling`). Ray Train's own looks at the cluster are up to 20 s old, and do not know
    what other jobs use."""

    SETTLE_S = 10.0  # what just ended may still count as used
    PAUSE_S = 0.25
    PATIENCE_S = 330.0  # the driver's own, for nodes that were lost, is shorter

    def __init__(self, config: ScalingConfig, resources: ResourcesSection, *, autoscaled: bool = True) -> None:
        """``autoscaled``: nodes may be added to the cluster; this machine's own Ray has one."""
        super().__init__(config)
        self._resources, self._autoscaled = resources, autoscaled
        self._asked_at = float("-inf")
        self._held: Counter[str] = Counter()
        self._since: float | None = None

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        now, most = time.monotonic(), self._resources.max_workers
        self._since = self._since or now
        nodes = self._nodes()
        count = min(most, room(self._resources, nodes, self._held))
        if count < most:
            self._ask_autoscaler()
        settling = count < min(most, workers_that_fit(self._resources, nodes)) and now - self._since < self.SETTLE_S
        if count >= self._resources.min_workers and not settling:
            self._since, self._held = None, Counter()
            return self._get_resize_decision(count)
        if now - self._since >= self.PATIENCE_S:
            raise NoRoom(
                f"for {self.PATIENCE_S:.0f} s there was room for {count} of {self._resources.min_workers} workers: "
                "other jobs hold the rest of the cluster's CPUs and GPUs; see `ray status`"
            )
        time.sleep(self.PAUSE_S)
        return NoopDecision()

    def _nodes(self) -> list[Node]:
        """Returns the nodes that answer; none while Ray's head does not."""
        try:
            return answering(nodes_of_cluster())
        except Exception:
            log.exception("the cluster's nodes could not be looked at")
            return []

    def after_controller_start(self, train_run_context: TrainRunContext) -> None:
        """Prepares the requests without sending one: the actor that answers takes seconds to start."""
        self._requester_id = f"train-{train_run_context.run_id}"
        self._coordinator_client = TrainAutoscalingCoordinatorClient(self._requester_id)

    async def before_controller_shutdown(self) -> None:
        if self._asked_at > float("-inf"):
            self._cancel_resource_request()  # type: ignore[no-untyped-call]

    def _ask_autoscaler(self) -> None:
        if self._autoscaled:
            client: Any = self._coordinator_client
            client.maybe_send_resource_request(self.scaling_config, self._resources.max_workers)
            self._asked_at = time.monotonic()

    def make_decision_for_running_worker_group(
        self, worker_group_state: WorkerGroupState, worker_group_status: WorkerGroupPollStatus
    ) -> ScalingDecision:
        if time.monotonic() - worker_group_state.start_time >= self.SETTLE_S:
            self._ask_autoscaler()
        self._held = Counter(worker.metadata.node_id for worker in worker_group_state.workers)
        return NoopDecision()


def gathered(error: BaseException) -> bool:
    """Returns True if the group ended because the driver requested a resize."""
    failures = error.worker_failures.values() if isinstance(error, WorkerGroupError) else ()
    return any(isinstance(unwrapped(failure), ResizeRequested) for failure in failures)


def cause_of(error: BaseException) -> Failure:
    if isinstance(error, WorkerGroupError) and error.worker_failures:
        return first_cause(error.worker_failures)
    if isinstance(error, ControllerError):
        return Failure(_controller_message(error.controller_failure))
    return Failure(f"{type(error).__name__}: {error}")


def explained(cause: Failure, run: Storage, step: int | None, since: float) -> Failure:
    """With what the run's events know of it: a group whose ranks were ended because one held them up failed of that;
    a rank that died did so on a host, and others have seen it. ``step``: the last one that the run had done; ``since``
    (unix s): no group of this driver's started before."""
    from trainer.checkpoint import read_claims
    from trainer.run.events import HangEvent
    from trainer.run.jsonl import newest_event

    if not cause.by_another:
        return cause
    if (hang := newest_event(run, read_claims(run).attempt, HangEvent)) is not None:
        return cause.of_hang(hang)
    if not cause.died or cause.rank is None:
        return cause
    group = newest_group(run, 0)
    if group is None or group.since < since or cause.rank >= len(group.hosts):
        return placed_death(cause, None, "", step)
    seen = _seen(run, group.attempt, cause.rank) if len(group.hosts) > 1 else ""
    return placed_death(cause, group.hosts[cause.rank], seen, step)


def _seen(run: Storage, attempt: int, rank: int) -> str:
    """Returns where other ranks last saw a rank that has died; they record it as soon as their collectives break."""
    from trainer.run.events import BrokenEvent
    from trainer.run.jsonl import newest_event

    for wait_s in SEEN_WAITS_S:
        time.sleep(wait_s)
        if (broken := newest_event(run, attempt, BrokenEvent)) is not None:
            return broken.seen.get(str(rank), "")
    return ""


def _controller_message(failure: BaseException) -> str:
    name = type(failure).__name__
    if name == "WorkerGroupStartupTimeoutError":
        return (
            f"the cluster did not give {getattr(failure, 'num_workers', 'the')} workers their CPUs and GPUs in time: "
            "other jobs hold them, or no single node has enough; see `ray status`"
        )
    return str(failure) if isinstance(failure, NoRoom) else f"{name}: {failure}"
