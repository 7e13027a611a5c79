"""Checkpoints of one attempt: restored once, taken by every rank, committed by rank 0 in the background.

`trainer.worker.train_state` defines what a checkpoint contains, `trainer.checkpoint` how it is stored.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from trainer.checkpoint import CommitRecord, Retention, commit, fetch, fetch_newest, put_checkpoint
from trainer.checkpoint.publish import EPOCHS, TOTAL_STEPS, chosen_of, is_last, publish
from trainer.data import Batch, Cursor, Stream
from trainer.distributed.world import World
from trainer.errors import InputError, MusterError
from trainer.model.files.identity import differences, identity_of
from trainer.run import layout
from trainer.run.best import ended_early
from trainer.run.events import CheckpointEvent, SkippedCheckpointEvent, StaleCheckpointEvent
from trainer.run.frozen import read_provenance
from trainer.run.metrics import StepMetrics
from trainer.storage import Storage
from trainer.worker.async_committer import CheckpointStall, Committer, Lag, StaleAlarm
from trainer.worker.build import Parts
from trainer.worker.callbacks import Callback, Position
from trainer.worker.final_files import write_final_files
from trainer.worker.job import Job
from trainer.worker.judge import Judge
from trainer.worker.recorder import Recorder
from trainer.worker.train_state import Snapshot, TrainState

log = logging.getLogger(__name__)
BEGINS_FROM = "begins_from"
"""Key of `Checkpointer.begins_from` in a commit record's state."""


@contextmanager
def fetched_once_per_host(world: World, target: Path, fetch_target: Callable[[], None]) -> Iterator[Path]:
    """Collective: yields the folder with a checkpoint's files that this rank reads, its own ``target`` or that of the
    first rank on its host. Rank 0 has its ``target`` already; ``fetch_target`` makes it.

    Every folder stays until all ranks have left the block. A rank that raises in it ends the attempt."""
    hosts = world.all_gather(world.host)
    first = hosts.index(world.host)
    if world.rank == first and not world.is_rank0:
        fetch_target()
    files = Path(world.all_gather(str(target))[first])
    if files != target and not os.path.isdir(files):
        fetch_target()  # ranks of one host, or hosts of one name, may have no temporary folder in common
        files = target
    yield files
    world.all_gather(None)


class Fetched(NamedTuple):
    """A complete checkpoint; ``files``: its folder on this host."""

    record: CommitRecord
    files: Path

    @property
    def begins_from(self) -> Mapping[str, Any] | None:
        """The trained adapter that the run has begun with (`trainer.worker.start.initial_weights`)."""
        return self.record.state.get(BEGINS_FROM)


class Checkpointer(Callback):
    """``chat_template``: the run's own, None for the tokenizer's. `newest`, `restore` and `on_checkpoint` are
    collectives."""

    begins_from: Mapping[str, Any] | None = None
    """See `Fetched.begins_from`; for the commit records."""

    def __init__(
        self, job: Job, parts: Parts, run: Storage, recorder: Recorder, judge: Judge, chat_template: str | None
    ) -> None:
        section = job.recipe.checkpoint
        self._job, self._parts, self._run, self._recorder = job, parts, run, recorder
        self._judge, self._chat_template = judge, chat_template
        self._state = TrainState(parts.strategy, parts.adapter, parts.task)
        self._retention = Retention(run, recorder.attempt, keep_last=section.keep_last, keep_for_s=section.keep_for_s)
        self._stale = StaleAlarm(section.max_age_s)
        self._stall_s = 0.0
        self._committer = Committer(self._commit, self._on_committed) if parts.world.is_rank0 else None

    @contextmanager
    def newest(self) -> Iterator[Fetched | None]:
        """Collective: yields the newest complete checkpoint, or None. Raises InputError if it was trained on another
        base model."""
        world = self._parts.world
        with tempfile.TemporaryDirectory(prefix="muster-restore-") as folder:
            target = Path(folder, "checkpoint")
            record = world.decide_on_rank0(lambda: self._fetch_newest(target))
            if record is None:
                yield None
                return
            with fetched_once_per_host(world, target, lambda: fetch(self._run, record, target)) as files:
                yield Fetched(record, files)

    def restore(self, found: Fetched | None, stream: Stream) -> Position:
        """Collective: loads a checkpoint. Returns the position after it, or the stream's start without one."""
        if found is None:
            return Position(0, stream.start())
        record, state = found.record, found.record.state
        self._state.load(found.files, state)
        self._recorder.resume_from(state.get("facts", {}))
        self._judge.resume_from(state)
        over = record.step >= self._job.total_steps or is_last(record, self._job.recipe.training)
        return Position(record.step, Cursor.from_json(state["cursor"]), over)

    def on_step_end(self, metrics: StepMetrics, batches: Sequence[Batch]) -> None:
        """Raises the error of a commit that failed."""
        if not self._committer:
            return
        lag = self._committer.lag()
        if self._stale.rings(lag.age_s):
            log.warning("no checkpoint was committed for %.0f s; the storage is slow or unreachable", lag.age_s)
            stale = StaleCheckpointEvent(step=metrics.step, backlog=lag.backlog, age_s=lag.age_s)
            self._recorder.event(stale, wait=False)
        self._committer.check()

    def on_checkpoint(self, position: Position, *, last: bool) -> None:
        """Collective; returns as soon as the state is copied to rank 0's host memory."""
        began = time.monotonic()
        self._recorder.settle_ledger()
        state = {
            "cursor": position.cursor.to_json(),
            "world_size": self._parts.world.size,
            "strategy": self._job.recipe.strategy.kind,
            TOTAL_STEPS: self._job.total_steps,
            EPOCHS: self._job.recipe.training.epochs,
            "facts": dict(self._recorder.last_metrics),
            **self._judge.state(),
            **({BEGINS_FROM: dict(self.begins_from)} if self.begins_from else {}),
        }
        copying = time.monotonic()
        snapshot = self._state.snapshot(position.step, state, final=last)
        now = time.monotonic()
        self._stall_s += now - began
        if self._committer and snapshot:
            self._committer.submit(snapshot, CheckpointStall(now - began, now - copying))

    def take_stall(self) -> tuple[float, Lag]:
        """Returns the seconds that checkpoints have blocked the loop since the last call, and how far the storage is
        behind. Rank 0 only."""
        assert self._committer, "rank 0 alone has a committer"
        stall_s, self._stall_s = self._stall_s, 0.0
        return stall_s, self._committer.lag()

    def close(self) -> None:
        """Waits until everything that was submitted is committed; raises if it could not be."""
        if self._committer:
            self._committer.close()

    def drain(self) -> None:
        """Waits like `close`, but never raises; used after a failure to save what was submitted before."""
        if self._committer:
            self._committer.drain()

    def _fetch_newest(self, target: Path) -> CommitRecord | None:
        record = fetch_newest(
            self._run, target, needed=self._state.needed, check=self._check_state, on_skip=self._on_skip
        )
        stored = record.state.get("base") if record else None
        changed = differences(stored, self._base) if isinstance(stored, dict) else []
        if changed:
            raise InputError(
                f"model.path {self._job.recipe.model.path} holds another base model than {self._run.url} was started "
                f"with: {', '.join(changed)}; put that one back, or start a run under another name"
            )
        return record

    def _check_state(self, record: CommitRecord) -> None:
        """Raises CorruptObject if training cannot resume from the record's state."""
        Cursor.from_json(record.state.get("cursor"))
        self._state.check(record.state)

    def _on_skip(self, step: int, uri: str, reason: str) -> None:
        log.warning("the checkpoint of step %d is skipped: %s", step, reason)
        self._recorder.event(SkippedCheckpointEvent(step=step, uri=uri, reason=reason))

    @cached_property
    def _base(self) -> dict[str, Any]:
        """The identity of the base model's files; empty if they cannot be read now."""
        try:
            return identity_of(self._job.recipe.model)
        except MusterError as error:
            log.warning("the base model's files cannot be read: %s", error)
            return {}

    def _commit(self, snapshot: Snapshot, folder: Path) -> dict[str, Any]:
        """Writes, verifies, uploads, commits, deletes old checkpoints. Runs on the committer's thread."""
        run = self._run
        self._state.write(snapshot, folder)
        last = snapshot.step == self._job.total_steps or ended_early(snapshot.state) is not None
        if last or snapshot.best:
            write_final_files(
                folder,
                self._parts,
                chat_template=self._chat_template,
                state=snapshot.state,
                provenance=read_provenance(run),
                base=self._base,
            )
        attempt = self._recorder.attempt
        unique, files = put_checkpoint(run, folder, attempt=attempt, step=snapshot.step, needed=self._state.needed)
        record = CommitRecord(
            step=snapshot.step,
            attempt=attempt,
            driver=self._job.driver,
            nonce=uuid.uuid4().hex,
            checkpoint=unique,
            files=files,
            state={**snapshot.state, "base": self._base},
            committed_at=datetime.now(UTC).isoformat(),
        )
        self._recorder.store_metrics()
        commit(run, record)
        self._retention.apply(record)
        if last:
            publish(run, chosen_of(run, record))
        return {"uri": run.uri(layout.checkpoint(unique)), "bytes": sum(f["bytes"] for f in files.values())}

    def _on_committed(self, done: CheckpointEvent) -> None:
        log.info("step %d is committed: %s", done.step, done.uri)
        self._recorder.event(done)
