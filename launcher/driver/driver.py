"""``muster run``: checks the inputs, freezes the recipe, prepares the data and trains on Ray.

The exit code follows from the storage (a commit of the last step, a final adapter that reads back as it was committed),
never from what Ray reports.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
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
from trainer.run.jsonl import newest_event
from trainer.run.lease import Lease, check_not_cancelled, is_cancelled
from trainer.run.outcome import leave
from trainer.run.startup_phases import DATA, IMPORT, RAY, Phases, process_began
from trainer.storage import Storage, local_path, open_storage
from trainer.tracking import check_trackers
from trainer.worker.held_run import hold_run, interrupted
from trainer.worker.job import Job

if TYPE_CHECKING:
    from launcher.driver.attempts import Runner
    from launcher.driver.background_prepare import EarlyStart
    from launcher.driver.resize import CurrentWorkers
    from trainer.data.run_data import RunData

FIRST_LOOK_S = 30.0  # a storage that does not answer now is more likely a wrong address than a bad minute


def run(
    recipe: Recipe,
    progress: Progress,
    *,
    takeover: bool = False,
    signals: Signals | None = None,
    runner: Runner | None = None,
) -> str:
    """Trains the recipe's run to its end, from its newest checkpoint; returns the final adapter's URI. ``signals``:
    what can stop it besides the process's own signals; ``runner``: where it trains, by default where the environment
    says.

    Raises UsageError (2) before anything is started, if the mistake can be known by then, Interrupted (3) after a stop
    that lost nothing, and any other MusterError (1) with the first cause of a failure.
    """
    return run_together([recipe], progress, takeover=takeover, signals=signals, runner=runner)[0]


def run_together(
    recipes: Sequence[Recipe],
    progress: Progress,
    *,
    takeover: bool = False,
    signals: Signals | None = None,
    runner: Runner | None = None,
) -> list[str]:
    """Does what `run` does for several runs, in the same processes and on one base model. The recipes have one storage,
    and fit together (`trainer.recipe.rules.together`)."""
    storage = open_storage(recipes[0].storage)
    first_look = open_storage(recipes[0].storage, deadline_s=FIRST_LOOK_S)
    for recipe in recipes:
        check_same_recipe(first_look.child(recipe.name), recipe)
    left = [recipe for recipe in recipes if not _is_complete(recipe, first_look, progress)]
    if left:
        begun = [has_commits(first_look.child(recipe.name)) for recipe in left]
        if not any(begun):
            current.command(STARTS)
        phases = Phases(process_began() if runner is None else time.monotonic())
        with ExitStack() as stack, called_often(progress.repeat):
            urls = [storage.child(recipe.name).url for recipe in left]
            starting = [stack.enter_context(one_at_a_time(url, takeover=takeover)) for url in urls]
            signals = signals or Signals(progress)
            with _checking(progress):
                for recipe, has_begun in zip(left, begun, strict=True):
                    _check(recipe, progress, begun=has_begun)
            phases.end(IMPORT)
            held = _hold(left, storage, signals, progress, takeover=takeover)
            for file in filter(None, starting):
                file.close()
            RunDriver(held, storage, signals, progress, phases, runner).drive()
            if len(held) < len(left):
                raise Interrupted("the cancelled runs are not complete; the same command in another job resumes them")
    return [storage.child(recipe.name).uri(layout.ADAPTER) for recipe in recipes]


def _is_complete(recipe: Recipe, storage: Storage, progress: Progress) -> bool:
    run = storage.child(recipe.name)
    last = finished(run, recipe.training)
    if last:
        progress.say(f"{run.url} {completed_text(last)} already")
    return last is not None


def _hold(
    recipes: Sequence[Recipe], storage: Storage, signals: Signals, progress: Progress, *, takeover: bool
) -> tuple[HeldRun, ...]:
    """Takes the leases of all runs, or of none, without those that `muster cancel` has ended in this job. Raises
    Interrupted if these are all."""
    held: list[HeldRun] = []
    job, shared = job_environment(os.environ).job, len(recipes) > 1
    cancelled = [recipe for recipe in recipes if job and is_cancelled(storage.child(recipe.name), job)]
    try:
        for recipe in recipes:
            run = storage.child(recipe.name)
            if len(cancelled) < len(recipes) and recipe in cancelled:
                progress.say(f"{run.url} was cancelled in {job}, which trains the others; it is left out")
                continue
            check_not_cancelled(run, job)
            with current.asking(signals.note):  # an exception within would leave a lease that nobody releases
                lease = Lease.acquire(run, job=job, shared=shared, takeover=takeover, sleep=signals.sleep)
            signals.tell(lease)
            held.append(HeldRun(recipe, run, lease))
    except BaseException as error:
        for one in held:
            leave(one.run, one.lease, "interrupted", error)
        raise
    return tuple(held)


def check_inputs(recipe: Recipe, progress: Progress, *, begun: bool = False) -> None:
    """Checks trackers, storage, model and data before anything is started. Raises InputError. A run that has ``begun``
    continues without a missing tracker, with a warning."""
    with _checking(progress):
        _check(recipe, progress, begun=begun)


@contextmanager
def _checking(progress: Progress) -> Iterator[None]:
    progress.phase("checking storage, model and data")
    yield
    progress.phase("")
    progress.dated("storage, model and data are checked")


def _check(recipe: Recipe, progress: Progress, *, begun: bool) -> None:
    from launcher.driver.preflight import check_begins_from, check_model, check_storage

    check_lasting(recipe, job_environment(os.environ).job)
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


def check_lasting(recipe: Recipe, job: str | None) -> None:
    """A Ray job's working directory goes with the job."""
    if job and job.startswith("ray:") and local_path(recipe.storage) and not recipe.storage.startswith(("/", "file:")):
        raise InputError(
            f"storage is {recipe.storage!r}, a folder in this job's working directory, which Ray deletes with the job; "
            "give a URL, or the absolute path of a folder that all nodes share"
        )


@dataclass(frozen=True)
class HeldRun:
    """A run whose lease this driver holds."""

    recipe: Recipe
    run: Storage
    lease: Lease

    def is_complete(self) -> bool:
        return finished(self.run, self.recipe.training) is not None

    def has_stopped(self) -> bool:
        """Returns True if the step of ``training.stop_after`` is committed."""
        step = self.recipe.training.stop_after
        return step is not None and any(record.step >= step for record in list_commits(self.run))


@dataclass(frozen=True)
class RunDriver:
    """The runs that are trained together, most often one, and all that this driver drives them with. The processes are
    those of the first one: its resources, strategy and cluster."""

    held: tuple[HeldRun, ...]
    storage: Storage
    signals: Signals
    progress: Progress
    phases: Phases
    runner: Runner | None = None

    @property
    def recipe(self) -> Recipe:
        return self.held[0].recipe

    def drive(self) -> None:
        """Trains all runs to their last steps."""
        with ExitStack() as stack:
            for one in self.held:
                stack.enter_context(self._holding(one))
            self._train()
            left = [one for one in self.held if not one.is_complete()]
            if left and (self.signals.stopped or all(one.lease.asked.is_set() or one.has_stopped() for one in left)):
                raise Interrupted(f"stopped on request; {RESUMES} of {left[0].run.url}")

    @contextmanager
    def _holding(self, one: HeldRun) -> Iterator[None]:
        """Holds a run. What has ended others is no failure of a run that is complete."""
        ended: BaseException | None = None
        with hold_run(one.recipe, one.run, one.lease, stopped=partial(self._was_stopped, one)):
            try:
                yield
            except BaseException as error:
                if len(self.held) == 1 or not one.is_complete():
                    raise
                ended = error
        if ended is not None:
            raise ended

    def _was_stopped(self, one: HeldRun, error: BaseException) -> bool:
        # After a signal, errors are its consequence, and what is committed counts.
        by_signal = current.heard is not None or interrupted(error)
        return by_signal or (isinstance(error, MusterError) and (self.signals.stopped or one.lease.asked.is_set()))

    def _train(self) -> None:
        here = job_environment(os.environ)
        self.signals.check()
        with self._runner(here.ray_address) as runner:
            runner.await_resources(here.nodes, lambda: self.signals.stopped)
            self.phases.end(RAY)
            self.progress.phase("preparing data")
            with self._early_start(runner) as early:
                data = [self._prepare(one, runner, early) for one in self.held]
                for prepared in {(one.train.fingerprint, one.total_steps): one for one in data}.values():
                    self.progress.data(prepared)
                self.signals.check()
                self.phases.end(DATA)
                self._fit(runner, [one.total_steps for one in data], early.check)

    def _early_start(self, runner: Runner) -> EarlyStart:
        from launcher.driver.background_prepare import EarlyStart

        on_window = partial(self.progress.prepared, "train")
        return EarlyStart(self.recipe.seed, runner.map_beside, on_window, lambda: self.signals.stopped)

    def _prepare(self, one: HeldRun, runner: Runner, early: EarlyStart) -> RunData:
        """Prepares a run's data and freezes its recipe."""
        from launcher.driver.preflight import load_run_tokenizer

        data = prepare_data(
            one.recipe,
            one.run,
            self.storage.child(layout.PREPARED),
            lambda: load_run_tokenizer(one.recipe),
            map_windows=runner.map(stopped=lambda: self.signals.stopped),
            on_progress=self.progress.prepared,
            early=early.prepare if len(self.held) == 1 else None,
        )
        freeze_recipe(one.run, one.recipe, one.lease.driver)
        return data

    def _runner(self, address: str | None) -> Runner:
        from launcher.driver.local import LocalRunner, needs_no_ray

        if self.runner is not None:
            return self.runner
        if address is None and needs_no_ray(self.recipe.resources, self.recipe.rollout.servers_beside):
            return LocalRunner(self.recipe)
        from launcher.raytrain.runner import RayRunner

        self.progress.phase(f"joining Ray at {address}" if address else "starting Ray")
        return RayRunner(self.recipe, address)

    def _job(self, steps: Sequence[int]) -> Job:
        """Returns the workers' assignment. ``steps``: of each run, in all."""
        jobs = [
            Job(
                one.recipe.storage,
                one.lease.driver,
                one.recipe,
                total,
                {**asdict(one.lease.holder), "by": "muster run"},
            )
            for one, total in zip(self.held, steps, strict=True)
        ]
        return replace(jobs[0], others=tuple(jobs[1:]))

    def _fit(self, runner: Runner, steps: Sequence[int], check_data: Callable[[], None]) -> None:
        from launcher.driver.attempts import Attempts

        attempts = Attempts(runner, self._job(steps), self.phases)
        before = [read_claims(one.run).attempt for one in self.held]
        longest = max(range(len(steps)), key=lambda n: steps[n])
        lead, claimed = self.held[longest], before[longest]
        if len(self.held) > 1:
            text = f"the steps below are those of {lead.recipe.name}; `muster ls {self.storage.url}` shows all runs"
            self.progress.say(text)
        shown = self.progress.training(
            lead.run, claimed, steps[longest], lambda: attempts.stage, driver=lead.lease.driver
        )
        ending: set[str] = set()
        with shown as show, self._watching(runner, before) as check_cluster, current.asking(self.signals.ask):

            def every() -> None:
                if show():
                    self.signals.note_step()
                check_data()
                check_cluster()
                if self.signals.stopped and not _has_steps(lead.run, claimed):
                    raise Interrupted(f"stopped before the first step; {current.promise}")
                for one in self.held:
                    if one.lease.lost.is_set():
                        raise WorkerFailed(f"another driver has taken {one.run.url} over; this one has stopped")
                    if one.lease.asked.is_set() and not self.signals.stopped and one.run.url not in ending:
                        ending.add(one.run.url)
                        self.progress.say(f"muster cancel: {one.run.url} commits and ends; the others continue")
                        one.lease.request_stop()

            attempts.run(every)

    @contextmanager
    def _watching(self, runner: Runner, before: Sequence[int]) -> Iterator[Callable[[], None]]:
        """Looks at a cluster's nodes while the workers train; yields what raises StartAgain when too few are left. A
        Ray of this machine's own has one node, which stays. ``before``: the number of each run's newest attempt before
        this driver's."""
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

        def group() -> CurrentWorkers | None:
            """Of the first run that trains: the others are complete."""
            found = (newest_group(one.run, attempt) for one, attempt in zip(self.held, before, strict=True))
            return next(filter(None, found), None)

        with NodeMonitor(lookout, runner.all_nodes, group, self._resize) as watch:
            yield watch.check

    def _resize(self, reason: str) -> None:
        from launcher.driver.attempts import record

        self.progress.say(f"{reason}: the workers commit and start again")
        for one in self.held:
            driver = one.lease.driver
            record(one.run, f"driver{driver}-resize", ResizeEvent(reason=reason, driver=driver))
            one.lease.request_resize()


def _has_steps(run: Storage, before: int) -> bool:
    """Returns True if an attempt after ``before`` has done a step, which can be committed, or if the storage does not
    answer."""
    try:
        attempt = read_claims(run).attempt
        return attempt > before and newest_event(run, attempt, StartupEvent) is not None
    except MusterError:
        return True


class Signals:
    """Records that the run must stop: because of a signal, or of a request in its storage.

    While the workers train, the first signal requests a commit and the end; the second leaves with what is committed by
    then. Before that there is nothing to commit, and the first one leaves (`trainer.interruption`).
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._stepped = False
        self._asked = threading.Event()
        self._leases: list[Lease] = []
        self._of_all: list[Lease] = []

    @property
    def stopped(self) -> bool:
        """True after a signal, or after a request in the storage of all runs, or of what they belong to."""
        each = [lease.asked.is_set() for lease in self._leases]
        if (each and all(each)) or any(lease.asked.is_set() for lease in self._of_all):
            self.ask("muster cancel")
        return self._asked.is_set()

    def tell(self, lease: Lease, *, of_all: bool = False) -> None:
        """``of_all``: the lease of a sweep, which all runs belong to."""
        (self._of_all if of_all else self._leases).append(lease)

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
        for lease in (*self._of_all, *self._leases):
            lease.request_stop()
