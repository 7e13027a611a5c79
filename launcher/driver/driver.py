"""``muster run``: checks the inputs, freezes the recipe, prepares the data and trains on Ray.

The exit code follows from the storage (a commit of the last step, a final adapter that reads back as it was committed),
never from what Ray reports.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING

from cluster.job_environment import job_environment
from launcher.driver.start_lock import one_at_a_time
from launcher.monitor.progress import Progress
from trainer.checkpoint import list_commits, read_claims
from trainer.checkpoint.publish import completed_text, finished
from trainer.data import check_local_sources
from trainer.data.run_data import prepare_data
from trainer.errors import InputError, Interrupted, MusterError, WorkerFailed
from trainer.interruption import RESUMES, STARTS, current
from trainer.progress.lines import called_often
from trainer.recipe import Recipe
from trainer.run import layout
from trainer.run.events import ResizeEvent, StartupEvent
from trainer.run.frozen import check_same_recipe, freeze_recipe, has_commits
from trainer.run.jsonl import Events, newest_event
from trainer.run.lease import Lease, check_not_cancelled
from trainer.run.startup_phases import DATA, IMPORT, RAY, Phases, process_began
from trainer.storage import Storage, local_path, open_storage
from trainer.tracking import check_trackers
from trainer.worker.held_run import hold_run, interrupted
from trainer.worker.job import Job

if TYPE_CHECKING:
    from launcher.driver.attempts import Runner

FIRST_LOOK_S = 30.0  # a storage that does not answer now is more likely a wrong address than a bad minute


def run(recipe: Recipe, progress: Progress, *, takeover: bool = False) -> str:
    """Trains the recipe's run to its end, from its newest checkpoint; returns the final adapter's URI.

    Raises UsageError (2) before anything is started, if the mistake can be known by then, Interrupted (3) after a stop
    that lost nothing, and any other MusterError (1) with the first cause of a failure.
    """
    storage = open_storage(recipe.storage)
    run_storage = storage.child(recipe.name)
    first_look = open_storage(recipe.storage, deadline_s=FIRST_LOOK_S).child(recipe.name)
    check_same_recipe(first_look, recipe)
    if last := finished(first_look, recipe.training):
        progress.say(f"{run_storage.url} {completed_text(last)} already")
        return run_storage.uri(layout.ADAPTER)
    begun = has_commits(first_look)
    if not begun:
        current.command(STARTS)
    phases, here = Phases(process_began()), job_environment(os.environ)
    with one_at_a_time(run_storage.url, takeover=takeover) as starting, called_often(progress.repeat):
        signals = Signals(progress)
        check_inputs(recipe, progress, begun=begun)
        phases.end(IMPORT)
        check_not_cancelled(run_storage, here.job)
        with current.asking(signals.note):  # an exception within would leave a lease that nobody releases
            lease = Lease.acquire(run_storage, job=here.job, takeover=takeover, sleep=signals.sleep)
        signals.tell(lease)
        if starting:
            starting.close()
        return RunDriver(recipe, storage, lease, signals, progress, phases).drive()


def check_inputs(recipe: Recipe, progress: Progress, *, begun: bool = False) -> None:
    """Checks trackers, storage, model and data before anything is started. Raises InputError. A run that has ``begun``
    continues without a missing tracker, with a warning."""
    from launcher.driver.preflight import check_begins_from, check_model, check_storage

    check_lasting(recipe, job_environment(os.environ).job)
    progress.phase("checking storage, model and data")
    try:
        check_trackers(recipe)
    except InputError as error:
        if not begun:
            raise
        progress.warn(str(error))
    storage = open_storage(recipe.storage, deadline_s=FIRST_LOOK_S)
    if not check_storage(storage):
        progress.say(
            f"{storage.url} has no conditional put: two drivers that start this run in the same moment cannot be told "
            "apart, so start it from one place only"
        )
    check_local_sources((*recipe.data.train, *recipe.data.eval))
    check_model(recipe, progress.warn)
    # A run with a checkpoint has its own weights, and that adapter may be gone.
    if recipe.adapter.begins_from and not (begun or has_commits(storage.child(recipe.name))):
        check_begins_from(recipe, progress.warn)
    progress.phase("")
    progress.dated("storage, model and data are checked")


def check_lasting(recipe: Recipe, job: str | None) -> None:
    """A Ray job's working directory goes with the job."""
    if job and job.startswith("ray:") and local_path(recipe.storage) and not recipe.storage.startswith(("/", "file:")):
        raise InputError(
            f"storage is {recipe.storage!r}, a folder in this job's working directory, which Ray deletes with the job; "
            "give a URL, or the absolute path of a folder that all nodes share"
        )


@dataclass(frozen=True)
class RunDriver:
    """A run whose lease this driver holds, and all that it drives the run with."""

    recipe: Recipe
    storage: Storage
    lease: Lease
    signals: Signals
    progress: Progress
    phases: Phases

    @cached_property
    def run(self) -> Storage:
        return self.storage.child(self.recipe.name)

    def drive(self) -> str:
        """Trains to the last step; returns the final adapter's URI."""
        with hold_run(self.recipe, self.run, self.lease, stopped=self._was_stopped):
            self._train()
            if (self.signals.stopped or self._has_stopped()) and finished(self.run, self.recipe.training) is None:
                raise Interrupted(f"stopped on request; {RESUMES} of {self.run.url}")
        return self.run.uri(layout.ADAPTER)

    def _was_stopped(self, error: BaseException) -> bool:
        # After a signal, errors are its consequence, and what is committed counts.
        by_signal = current.heard is not None or interrupted(error)
        return by_signal or (isinstance(error, MusterError) and self.signals.stopped)

    def _has_stopped(self) -> bool:
        """Returns True if the step of ``training.stop_after`` is committed."""
        step = self.recipe.training.stop_after
        return step is not None and any(record.step >= step for record in list_commits(self.run))

    def _train(self) -> None:
        from launcher.driver.background_prepare import EarlyStart
        from launcher.driver.preflight import load_run_tokenizer

        recipe, progress, here = self.recipe, self.progress, job_environment(os.environ)
        self.signals.check()
        with self._runner(here.ray_address) as runner:
            runner.await_resources(here.nodes, lambda: self.signals.stopped)
            self.phases.end(RAY)
            progress.phase("preparing data")
            on_window = partial(progress.prepared, "train")
            with EarlyStart(recipe.seed, runner.map_beside, on_window, lambda: self.signals.stopped) as early:
                data = prepare_data(
                    recipe,
                    self.run,
                    self.storage.child(layout.PREPARED),
                    lambda: load_run_tokenizer(recipe),
                    map_windows=runner.map(stopped=lambda: self.signals.stopped),
                    on_progress=progress.prepared,
                    early=early.prepare,
                )
                progress.data(data)
                freeze_recipe(self.run, recipe, self.lease.driver)
                self.signals.check()
                self.phases.end(DATA)
                self._fit(runner, data.total_steps, early.check)

    def _runner(self, address: str | None) -> Runner:
        from launcher.driver.local import LocalRunner, needs_no_ray

        if address is None and needs_no_ray(self.recipe.resources, self.recipe.rollout.servers_beside):
            return LocalRunner(self.recipe)
        from launcher.raytrain.runner import RayRunner

        self.progress.phase(f"joining Ray at {address}" if address else "starting Ray")
        return RayRunner(self.recipe, address)

    def _fit(self, runner: Runner, total_steps: int, check_data: Callable[[], None]) -> None:
        from launcher.driver.attempts import Attempts

        lease = self.lease
        by = {**asdict(lease.holder), "by": "muster run"}
        attempts = Attempts(runner, Job(self.recipe.storage, lease.driver, self.recipe, total_steps, by), self.phases)
        before = read_claims(self.run).attempt
        shown = self.progress.training(self.run, before, total_steps, lambda: attempts.stage, driver=lease.driver)
        with shown as show, self._watching(runner, before) as check_cluster, current.asking(self.signals.ask):

            def every() -> None:
                if show():
                    self.signals.note_step()
                check_data()
                check_cluster()
                if self.signals.stopped and not self._has_steps(before):
                    raise Interrupted(f"stopped before the first step; {current.promise}")
                if lease.lost.is_set():
                    raise WorkerFailed(f"another driver has taken {self.run.url} over; this one has stopped")

            attempts.run(every)

    def _has_steps(self, before: int) -> bool:
        """Returns True if the current attempt has done a step, which can be committed, or if the storage does not
        answer."""
        try:
            attempt = read_claims(self.run).attempt
            return attempt > before and newest_event(self.run, attempt, StartupEvent) is not None
        except MusterError:
            return True

    @contextmanager
    def _watching(self, runner: Runner, before: int) -> Iterator[Callable[[], None]]:
        """Looks at a cluster's nodes while the workers train; yields what raises StartAgain when too few are left. A
        Ray of this machine's own has one node, which stays. ``before``: the number of the newest attempt before."""
        from launcher.capacity import Servers, missing
        from launcher.driver.resize import (
            LOST_PATIENCE_IN_JOB_S,
            LOST_PATIENCE_S,
            NodeMonitor,
            ResizePolicy,
            newest_group,
        )

        here, resources = job_environment(os.environ), self.recipe.resources
        if here.ray_address is None:
            yield lambda: None
            return
        patience_s = LOST_PATIENCE_IN_JOB_S if here.nodes else LOST_PATIENCE_S
        servers = Servers.of(self.recipe)
        lookout = ResizePolicy(
            resources,
            partial(missing, resources, servers=servers),
            patience_s,
            self.recipe.strategy.context_parallel,
            servers,
        )
        group = partial(newest_group, self.run, before)
        with NodeMonitor(lookout, runner.all_nodes, group, self._resize) as watch:
            yield watch.check

    def _resize(self, reason: str) -> None:
        self.progress.say(f"{reason}: the workers commit and start again")
        events = Events(self.run, read_claims(self.run).attempt, f"driver{self.lease.driver}-resize")
        events.emit(ResizeEvent(reason=reason, driver=self.lease.driver))
        events.close()
        self.lease.request_resize()


class Signals:
    """Records that the run must stop: because of a signal, or of a request in its storage.

    While the workers train, the first signal requests a commit and the end; the second leaves with what is committed by
    then. Before that there is nothing to commit, and the first one leaves (`trainer.interruption`).
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._stepped = False
        self._asked = threading.Event()
        self._lease: Lease | None = None

    @property
    def stopped(self) -> bool:
        """True after a signal, or after a request in the run's storage."""
        if self._lease is not None and self._lease.asked.is_set():
            self.ask("muster cancel")
        return self._asked.is_set()

    def tell(self, lease: Lease) -> None:
        self._lease = lease

    def check(self) -> None:
        if self.stopped:
            raise Interrupted(f"stopped before training began; {current.promise}")

    def note_step(self) -> None:
        """Notes that the workers have done a step, so that there is something to commit."""
        self._stepped = True
        current.command(RESUMES)

    def note(self, who: str) -> None:
        """Remembers a signal, for the next `check` or `sleep`."""
        self._asked.set()

    def sleep(self, seconds: float) -> None:
        """Raises Interrupted at once when a signal comes."""
        if self._asked.wait(seconds):
            self.check()

    def ask(self, who: str) -> None:
        """Requests that the workers commit and end; only the first call has an effect."""
        if self._asked.is_set():
            return
        self._asked.set()
        does = (
            "the workers commit and end" if self._stepped else "the run ends, with a checkpoint if it has done a step"
        )
        self._progress.say(f"{who}: {does}; once more to leave at once")
        if self._lease:
            self._lease.request_stop()
