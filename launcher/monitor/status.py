"""The status of a run, read only from its storage, from any machine, also while the run is active."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain, islice
from typing import Any, NamedTuple

from trainer.checkpoint.protocol import list_commits
from trainer.checkpoint.record import CommitRecord
from trainer.errors import CorruptObject, InputError
from trainer.redact import clean
from trainer.run import layout
from trainer.run.best import ended_early, read_best
from trainer.run.claims import read_claims
from trainer.run.events import EndEvent, FailureEvent
from trainer.run.frozen import no_run
from trainer.run.jsonl import newest_failure, newest_rows, rows_backwards
from trainer.run.lease import ENDED, GLANCE_S, LeaseRecord, is_held, read_lease
from trainer.run.submission import Submission, read_submission
from trainer.storage import Storage, in_parallel

PARALLEL_RUNS = 32
_ROWS_LOOKED_AT = 2000
_POSITION = ("attempt", "step", "total_steps", "world_size", "samples", "epoch")
_ASIDE = (*_POSITION, "time")
_HEAD = ("event", "writer", "driver")


@dataclass(frozen=True)
class CheckpointStatus:
    """A committed checkpoint; ``committed_at`` is ISO 8601 in UTC."""

    step: int
    uri: str
    committed_at: str


@dataclass(frozen=True)
class Status:
    """The status of a run.

    ``step``: the last step in the metrics. ``metrics``: the values of the last step and of the last evaluation.
    ``job``: the scheduler's or cluster's job as ``kind:id``: the one that holds the run, else the last submitted one.
    ``heard_at`` (Unix time): the last sign of life of the last driver. ``seen_at``: the time of the last step while the
    run is active, else ``heard_at``. ``failure``: the newest failure of the last driver, unless the run has succeeded,
    with ``cause``, ``trace``, ``advice``, the place, and ``retried``. ``best``: the best evaluation by
    `checkpoint.keep_best`, with ``metric``, ``value`` and ``step``. ``early_stop``: why the run has ended before
    ``total_steps``, with ``metric``, its last best ``value`` and ``step``, and the ``evaluations`` since.
    """

    name: str
    uri: str
    state: str
    step: int
    total_steps: int
    attempts: int
    world_size: int
    samples: int
    epoch: int
    holder: str | None
    job: str | None
    checkpoints: tuple[CheckpointStatus, ...]
    metrics: Mapping[str, Any]
    seen_at: float | None = None
    heard_at: float | None = None
    failure: Mapping[str, Any] | None = None
    best: Mapping[str, Any] | None = None
    early_stop: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read_status(
    run: Storage, *, now: float | None = None, newest: int | None = None, earlier: LeaseRecord | None = None
) -> Status:
    """Reads the status with few requests. Raises InputError if there is no run.

    ``now``: Unix time, by default of this machine's clock. ``newest``: reads the records of only so many checkpoints.
    ``earlier``: the run's lease as it was `GLANCE_S` ago, if the caller has read it.
    """
    with ThreadPoolExecutor(5) as pool:
        begun = pool.submit(run.info, layout.RECIPE)
        claims = pool.submit(read_claims, run)
        commits = pool.submit(list_commits, run, newest=newest)
        submitted = pool.submit(read_submission, run)
        rows = pool.submit(_last_rows, run)
        lease = _lease(run)
        failure = newest_failure(run, lease.driver) if lease and lease.state != "succeeded" else None
    if begun.result() is None and lease is None and submitted.result() is None:
        raise no_run(run)
    found = _Found(lease, submitted.result(), claims.result().attempt, commits.result(), rows.result(), failure)
    return _status(run, found, _state(run, lease, time.time() if now is None else now, earlier))


def read_state(run: Storage, *, now: float | None = None) -> str:
    """Returns the run's state from its lease only: one read, unless the lease may have expired."""
    return _state(run, _lease(run), time.time() if now is None else now)


def list_runs(storage: Storage) -> list[Status]:
    """Returns the runs directly inside a storage, by name, with their newest checkpoint only.

    Folders without a run are left out.
    """

    def status_or_none(pair: tuple[Storage, LeaseRecord | None]) -> Status | None:
        try:
            return read_status(pair[0], newest=1, earlier=pair[1])
        except InputError:
            return None

    runs = [storage.child(name) for name in storage.folders() if not name.startswith(("_", "."))]
    leases = in_parallel(_lease, runs, PARALLEL_RUNS)
    if any(lease is not None and lease.may_be_alive() and not lease.is_fresh(time.time()) for lease in leases):
        time.sleep(GLANCE_S)  # one wait for all leases that may have expired
    found = in_parallel(status_or_none, zip(runs, leases, strict=True), PARALLEL_RUNS)
    return [status for status in found if status is not None]


class _Found(NamedTuple):
    """The records of a run from which its status is made."""

    lease: LeaseRecord | None
    submitted: Submission | None
    attempts: int
    commits: list[CommitRecord]
    row: Mapping[str, Any]
    failure: FailureEvent | EndEvent | None


def _status(run: Storage, found: _Found, state: str) -> Status:
    lease, commits = found.lease, found.commits
    # The newest checkpoint stores the values of the last evaluation before it.
    facts: Mapping[str, Any] = commits[0].state.get("facts", {}) if commits else {}
    row = {**{name: value for name, value in facts.items() if name.startswith("eval_")}, **found.row}
    newest: Mapping[str, Any] = {"step": commits[0].step, **commits[0].state} if commits else {}
    position = {key: int(row.get(key) or newest.get(key) or 0) for key in _POSITION}
    heard = lease.time if lease else None
    failure = found.failure.row if found.failure else None
    holder = lease.holder if lease and lease.state not in ENDED else None
    best, early = (read_best(commits[0].state), ended_early(commits[0].state)) if commits else (None, None)
    newest_job = found.submitted.job if found.submitted else lease.holder.job if lease else None
    return Status(
        name=run.url.rsplit("/", 1)[-1],
        uri=run.url,
        state=state,
        step=position["step"],
        total_steps=position["total_steps"],
        attempts=found.attempts,
        world_size=position["world_size"],
        samples=position["samples"],
        epoch=position["epoch"],
        holder=str(holder) if holder else None,
        job=holder.job if holder and holder.job else newest_job,
        checkpoints=tuple(_checkpoints(run, commits)),
        metrics={key: value for key, value in row.items() if key not in _ASIDE},
        seen_at=row.get("time") or heard if state == "running" else heard or row.get("time"),
        heard_at=heard,
        best={"metric": best.metric, "value": best.value, "step": best.step} if best else None,
        early_stop=asdict(early) if early else None,
        failure=failure and clean({name: value for name, value in failure.items() if name not in _HEAD}),
    )


def _state(run: Storage, lease: LeaseRecord | None, now: float, earlier: LeaseRecord | None = None) -> str:
    """Returns the state as `muster run` would find it: a lease that looks old is watched for a renewal."""
    if lease is None:
        return "interrupted"
    if lease.state in ENDED:
        return lease.state
    return "running" if is_held(run, lease, earlier=earlier, clock=lambda: now) else "interrupted"


def _checkpoints(run: Storage, commits: list[CommitRecord]) -> list[CheckpointStatus]:
    """Returns the checkpoints by step; if two attempts committed the same step, that of the newer one."""
    by_step = {c.step: c for c in reversed(commits)}
    return [
        CheckpointStatus(step, run.uri(layout.checkpoint(c.checkpoint)), c.committed_at)
        for step, c in sorted(by_step.items())
    ]


def _lease(run: Storage) -> LeaseRecord | None:
    try:
        return read_lease(run)
    except CorruptObject:
        return None


def _last_rows(run: Storage) -> dict[str, Any]:
    """Returns the row of the last training step, with the values of the last evaluation if that is near."""
    train: dict[str, Any] = {}
    evaluation: dict[str, Any] = {}
    near = newest_rows(run, layout.METRICS)
    further = () if any("loss" in row for row in near) else islice(rows_backwards(run, layout.METRICS), _ROWS_LOOKED_AT)
    for row in chain(reversed(near), further):
        if not train and "loss" in row:
            train = row
        if not evaluation and "eval_loss" in row:
            evaluation = {key: value for key, value in row.items() if key not in _ASIDE}
    return {**evaluation, **train}
