"""Cancels a run through its storage, and its job at the scheduler or cluster."""

from __future__ import annotations

import time

from cluster import KINDS, ClusterError, cluster_of
from cluster.job import Say
from launcher.submit.submit import FIRST_LOOK_S
from trainer.errors import InputError, WorkerFailed
from trainer.run import layout
from trainer.run.submission import Submission, read_submission
from trainer.storage import Storage, open_storage

END_WAIT_S = 120.0
LOOK_S = 1.0
HELD_S = 10.0
"""A run that has ended and is held for longer is one of several that are trained together: the others continue."""


def cancel_run(run_uri: str, say: Say) -> None:
    """Stops a run: its workers commit, and its job is not started again. A job that trains other runs too continues
    without it. Raises InputError if there is no such run, WorkerFailed if it did not end in time."""
    from trainer.run.lease import is_held, read_lease, request_end
    from trainer.run.sweep import is_trial

    run = _run_or_sweep(run_uri)
    lease, made = read_lease(run), read_submission(run)
    if lease is None and made is None and run.info(layout.RECIPE) is None:
        raise InputError(f"there is no run at {run.url}; `muster ls` with the folder above it lists its runs")
    # The job that trains a trial trains the others of its sweep too.
    jobs = jobs_of(made, lease.holder.job if lease and not is_trial(run_uri) else None)
    newest = made if lease is None or (made and made.time > lease.time) else lease
    shared = newest is not None and newest.shared
    # A job that starts later, or is started again, reads this request and ends at once.
    request_end(run, lease.driver if lease else None, sorted({*jobs, *map(name_in_driver, jobs)}))
    ended = True
    if lease is not None and is_held(run, lease):
        say(f"asked {lease.holder} to commit and end")
        ended = _await_end(run, lease.driver)
    if shared and jobs:
        say(f"{', '.join(jobs)} trains other runs too, and continues until all of them have ended")
    gone = [] if shared else [_cancel_job(job, run.url, say) for job in jobs]
    if not ended and not any(gone):
        raise WorkerFailed(f"the driver of {run.url} did not end within {END_WAIT_S:.0f} s; look at its host")
    say(f"{run.url} is stopped; the command that started it resumes from the newest checkpoint")


def _run_or_sweep(run_uri: str) -> Storage:
    """Returns the run, or the records of the sweep of this name (`trainer.run.sweep`), whose trials then end: if there
    is no run, or if the sweep is what is running."""
    from trainer.run.lease import is_held, read_lease
    from trainer.run.sweep import sweep_at

    run, sweep = open_storage(run_uri, deadline_s=FIRST_LOOK_S), sweep_at(run_uri, deadline_s=FIRST_LOOK_S)
    if sweep is None:
        return run
    lease = read_lease(sweep)
    running = lease is not None and is_held(sweep, lease)
    return sweep if running or run.info(layout.RECIPE) is None else run


def name_in_driver(job: str) -> str:
    """Returns the job's name in its own driver: the driver of a Ray job knows its submission id, but not the address
    that it was submitted to."""
    return f"ray:{job.rpartition('/')[2]}" if job.startswith("ray:http") else job


def jobs_of(made: Submission | None, holder: str | None) -> list[str]:
    """Returns the run's jobs: the last one submitted, and the one that its driver runs in, if that is another."""
    jobs = [made.job] if made else []
    if holder and not (made and name_in_driver(made.job) == holder):
        jobs.append(holder)
    return [job for job in jobs if job.partition(":")[0] in KINDS]


def _await_end(run: Storage, driver: int) -> bool:
    """Returns True if the run ends within ``END_WAIT_S`` after the request."""
    from trainer.run.claims import read_claims
    from trainer.run.events import EndEvent
    from trainer.run.jsonl import newest_event
    from trainer.run.lease import is_held, read_lease

    deadline, ended_at = time.monotonic() + END_WAIT_S, float("inf")
    while (now := time.monotonic()) < deadline:
        lease = read_lease(run)
        if lease is None or lease.driver != driver or not is_held(run, lease):
            return True
        if newest_event(run, read_claims(run).attempt, EndEvent) is not None:
            ended_at = min(ended_at, now)
        if now - ended_at >= HELD_S:
            return True
        time.sleep(LOOK_S)
    return False


def _cancel_job(job: str, run_uri: str, say: Say) -> bool:
    """Returns True if the job has certainly ended. If its cluster's commands are missing, only the storage has the
    request."""
    kind, _, name = job.partition(":")
    try:
        cluster_of(kind).cancel(name, run_uri)
    except ClusterError as error:
        say(f"{job} itself was not cancelled; if it starts again, it ends at once ({error})")
        return False
    return True
