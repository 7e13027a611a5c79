"""One rank of one attempt: joins the world, builds the model, restores, trains, commits.

The same function runs under Ray Train and under torchrun; whoever starts it has frozen the recipe and prepared the
data, and holds the run's lease.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trainer.artifacts.reward_model import reward_model
from trainer.checkpoint import CommitRecord, Retention, claim_attempt, commit, fetch, fetch_whole, put_checkpoint
from trainer.checkpoint.artifact_info import ArtifactInfo
from trainer.checkpoint.model_card import model_card
from trainer.checkpoint.publish import TOTAL_STEPS, publish
from trainer.data import Batch, Cursor, Stream, eval_batches, open_caches
from trainer.data.run_data import RunData, open_data, weights
from trainer.distributed.world import World, device_name, join_world
from trainer.errors import InputError, Interrupted, MusterError, note_where
from trainer.fast_imports import load_libraries
from trainer.model import load_tokenizer, save_head_config
from trainer.model.files.identity import differences, identity_of
from trainer.run import layout
from trainer.run.failure import COLLECTIVE
from trainer.run.frozen import read_provenance, versions
from trainer.run.startup_phases import DATA, FIRST_STEP, MODEL, SAMPLES, WORKERS, Phases
from trainer.storage import open_storage
from trainer.strategies.compiling import Warmup
from trainer.worker.async_committer import CheckpointStall, Committed, Committer, StaleAlarm
from trainer.worker.build import build_parts
from trainer.worker.hang_detector import (
    COMPILING_PATIENCE_S,
    LEAST_PATIENCE_S,
    Heartbeat,
    Pulse,
    end_culprits,
    hang_text,
    store_of_group,
)
from trainer.worker.job import Job
from trainer.worker.loop import Callbacks, Loop, Position
from trainer.worker.metering import meter_of
from trainer.worker.profiler import Profiler
from trainer.worker.rank_timer import RANK_FIELDS
from trainer.worker.recorder import Recorder
from trainer.worker.sample_texts import Opening, Samples
from trainer.worker.train_state import Snapshot, TrainState

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

LOG_EVERY_S = 10.0
REPORTING_RANKS = 2
"""Those of the lowest numbers tell where they saw the others last: one of them is left when another has died."""


def train(job: Job, stop_requested: Callable[[], bool]) -> Position:
    """Trains until the last step; every rank of the attempt calls it.

    ``stop_requested`` is asked on every rank after each step; one yes ends the attempt with a commit.
    Raises Interrupted when it ended before the last step, after its state was committed.
    """
    phases = Phases(time.monotonic(), job.spent)
    load_libraries()
    torch.manual_seed(job.recipe.seed)
    torch.set_num_threads(job.recipe.resources.cpus_per_worker)
    if job.recipe.compute.tf32:
        torch.set_float32_matmul_precision("high")
    with join_world(gpu=job.recipe.resources.gpus_per_worker > 0) as world:
        phases.end(WORKERS)
        attempt = Attempt(job, world, phases)
        try:
            return attempt.run(stop_requested)
        except Exception as error:
            note_where(error, attempt.doing)
            raise


class Attempt:
    """The parts of one attempt on one rank, in the order in which they are made."""

    def __init__(self, job: Job, world: World, phases: Phases | None = None) -> None:
        self.job, self.world, self.recipe = job, world, job.recipe
        self.starting: Phases | None = phases
        self.storage = open_storage(job.storage)
        self.run_storage = self.storage.child(job.recipe.name)
        self.began = time.monotonic()
        self.logged_at = 0.0
        self.doing = "opening the data"
        self.seen: Callable[[], dict[int, str]] = dict

    def run(self, stop_requested: Callable[[], bool]) -> Position:
        run, recipe = self.run_storage, self.recipe
        data = open_data(recipe, run, self.storage.child(layout.PREPARED))
        self.cache, self.eval_cache = open_caches(data.train, data.eval, recipe.data.cache_bytes)
        self.chat_template = data.train.spec.chat_template
        self._phase_over(DATA)
        self.doing = "loading the model"
        self._build(data.train.spec.labels)
        self.doing = "restoring the checkpoint"
        self.number = self.world.decide_on_rank0(lambda: claim_attempt(run, self.job.driver, dict(self.job.holder)))
        self.recorder = Recorder(run, recipe, self.world, self.number)
        world = self.world
        log.info("attempt %d: rank %d of %d on %s (%s)", self.number, world.rank, world.size, world.host, world.device)
        stream = self._stream(data)
        restoring = time.monotonic()
        start = self._restore(stream)
        self._say_started(start, time.monotonic() - restoring)
        self._phase_over(MODEL)
        keep = recipe.checkpoint
        self.retention = Retention(run, self.number, keep_last=keep.keep_last, keep_for_s=keep.keep_for_s)
        self.stall_s, self.stale = 0.0, StaleAlarm(keep.max_age_s)
        self.committer = Committer(self._commit, self._committed) if self.world.is_rank0 else None
        with self._recorded():
            end = self._train(data, stream, start, stop_requested)
            if self.committer:
                self.committer.close()
            self.world.all_gather(None)  # nobody leaves before the last commit is in
            return self._end(end)

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        """Commits and stores what there is, also after a failure; it is the failure that is told then, not that its
        record could not be stored either."""
        try:
            yield
        except BaseException as error:
            try:
                if self.world.rank < REPORTING_RANKS and COLLECTIVE.search(str(error)):
                    self.recorder.broken(self.seen())  # first: when a rank has died, the others are ended soon
                if self.committer:
                    self.committer.drain()
                self.recorder.close()
            except MusterError as error:
                log.warning("the records of attempt %d are not complete: %s", self.number, error)
            raise
        self.recorder.close()

    def _build(self, labels: tuple[str, ...]) -> None:
        built = build_parts(self.recipe, self.world, labels, reward_model(self.recipe, self.world.device))
        self.files, self.adapter, self.task = built.files, built.adapter, built.task
        self.strategy, self.load = built.strategy, built.load
        self.attention, self.meter = built.attention, meter_of(self.recipe, self.world, built.operations)
        self.state = TrainState(built.strategy, built.adapter, built.task)

    def _stream(self, data: RunData) -> Stream:
        recipe = self.recipe
        return Stream(
            data.train,
            self.run_storage,
            seed=recipe.seed,
            sequence_length=recipe.data.sequence_length,
            packing=recipe.data.packing,
            weights=weights(recipe.data),
            global_batch=recipe.training.global_batch,
            micro_batch=recipe.training.micro_batch,
            cache=self.cache,
        )

    def _restore(self, stream: Stream) -> Position:
        """The one way to begin: from the newest whole checkpoint, or from nothing."""
        with tempfile.TemporaryDirectory(prefix="muster-restore-") as folder:
            target = Path(folder, "checkpoint")
            record = self.world.decide_on_rank0(lambda: self._fetch_newest(target))
            if record is None:
                return Position(0, stream.start())
            if not self.world.is_rank0:
                fetch(self.run_storage, record, target)
            self.state.load(target, record.state)
            self.recorder.go_on(record.state.get("facts", {}))
            return Position(record.step, Cursor.from_json(record.state["cursor"]))

    def _fetch_newest(self, target: Path) -> CommitRecord | None:
        """On rank 0. Raises InputError when the base is another one by now, on which the checkpoint means nothing."""
        record = fetch_whole(
            self.run_storage, target, needed=self.state.needed, check=self._check_state, on_skip=self._skipped
        )
        was = record.state.get("base") if record else None
        unlike = differences(was, self.base) if isinstance(was, dict) else []
        if unlike:
            raise InputError(
                f"model.path {self.recipe.model.path} holds another base than {self.run_storage.url} was begun with: "
                f"{', '.join(unlike)}; put that one back, or start a run under another name"
            )
        return record

    @cached_property
    def base(self) -> dict[str, Any]:
        """By which the base is known again; empty where it cannot be looked at now."""
        try:
            return identity_of(self.recipe.model)
        except MusterError as error:
            log.warning("the base cannot be looked at: %s", error)
            return {}

    def _check_state(self, record: CommitRecord) -> None:
        """Raises CorruptObject when training cannot go on from what the record holds beside its files."""
        Cursor.from_json(record.state.get("cursor"))
        self.state.check(record.state)

    def _skipped(self, step: int, uri: str, reason: str) -> None:
        log.warning("the checkpoint of step %d is passed over: %s", step, reason)
        self.recorder.event("skipped_checkpoint", step=step, uri=uri, reason=reason)

    def _say_started(self, start: Position, restore_s: float) -> None:
        log.info("built, and begins after step %d", start.step)
        world, strategy = self.world, self.strategy.describe()
        ranks = world.all_gather((world.host, os.getpid(), device_name(world.device)))
        hosts, pids, devices = zip(*ranks, strict=True)
        self.recorder.event(
            "start",
            step=start.step,
            total_steps=self.job.total_steps,
            driver=self.job.driver,
            hosts=hosts,
            pids=pids,
            devices=devices,
            versions=versions() if world.is_rank0 else {},
            world_size=world.size,
            strategy=strategy,
            load=self.load,
            attention=self.attention,
            trainable_parameters=self.strategy.trainable_elements(),
            build_s=time.monotonic() - self.began - restore_s,
            restore_s=restore_s,
        )

    def _train(self, data: RunData, stream: Stream, start: Position, stop_requested: Callable[[], bool]) -> Position:
        if start.step >= min(self.job.total_steps, self.recipe.training.stop_after or self.job.total_steps):
            return start
        world, patience = self.world, COMPILING_PATIENCE_S if self.recipe.compute.compile else LEAST_PATIENCE_S
        self.heartbeat = Heartbeat(
            world.rank, world.size, world.host, store_of_group(), self._hang, least_patience_s=patience
        )
        self.seen = self.heartbeat.seen
        self.warmup = Warmup(self.recipe.compute.compile)
        tell = partial(self.recorder.said, "profile")
        opening = Opening(data.eval, self.eval_cache, self._tokenizer)
        samples = Samples(self.recipe, world, self.strategy, self.task, self.recorder, opening, self._doing)
        profiler = Profiler(self.recipe, self.world, self.run_storage, self.number, tell)
        hooks = Callbacks(
            step_done=self._step_done,
            fed=self.recorder.fed,
            checkpoint=self._checkpoint,
            evaluated=lambda row: self.recorder.metrics(row, **self._compiled(row["step"])),
            stop_requested=stop_requested,
            phase=self._doing,
            around_step=profiler.around,
            around_update=lambda step: self.adapter.around_update(self.strategy.model, step, self.job.total_steps),
            examples=lambda step, shown: self.recorder.event("texts", wait=False, step=step, texts=shown),
            samples=partial(self._samples, samples),
        )
        loop = Loop(
            self.recipe,
            self.world,
            self.strategy,
            self.task,
            hooks,
            total_steps=self.job.total_steps,
            eval_batches=(lambda: self._eval_batches(data)) if data.eval else None,
            meter=self.meter,
        )
        reading = closing(stream.prefetch(start.cursor, self.world.rank, self.world.size))
        with closing(profiler), self.heartbeat, reading as steps:
            return loop.run(start, steps)

    def _samples(self, samples: Samples, step: int) -> None:
        samples.write(step)
        self._phase_over(SAMPLES)

    def _doing(self, step: int, phase: str) -> None:
        self.heartbeat.phase(step, phase)
        self.doing = f"step {step}, {phase}"

    def _hang(self, found: list[Pulse]) -> None:
        try:
            self.recorder.hang(found, hang_text(found, self.heartbeat.still_s()))
        finally:
            end_culprits(found, self.world.host)

    def _eval_batches(self, data: RunData) -> Iterator[Batch]:
        assert data.eval is not None
        world = self.world
        return eval_batches(data.eval, self.recipe.training.micro_batch, world.rank, world.size, cache=self.eval_cache)

    def _phase_over(self, phase: str) -> None:
        if self.starting:
            self.starting.end(phase)

    def _started(self, step: int) -> None:
        """After the first step."""
        if self.starting:
            self.starting.end(FIRST_STEP)
            spent = self.starting.spent()
            self.recorder.event("startup", wait=False, step=step, seconds=spent, total_s=sum(spent.values()))
            self.starting = None

    def _step_done(self, metrics: dict[str, Any]) -> None:
        """A row's ``stall_s`` is what checkpoints took since the row before."""
        self._started(metrics["step"])
        self.heartbeat.step_done(metrics["step_s"])
        self._log_step(metrics)
        if not self.committer:
            return
        lag = self.committer.lag()
        aside: dict[str, Any] = {"stall_s": self.stall_s, "backlog": lag.backlog, "checkpoint_age_s": lag.age_s}
        aside |= {name: metrics[name] for name in RANK_FIELDS if name in metrics}
        facts = {name: value for name, value in metrics.items() if name not in RANK_FIELDS}
        self.recorder.metrics(facts, **aside, **self._compiled(metrics["step"]))
        self.stall_s = 0.0
        if self.stale.rings(lag.age_s):
            log.warning("no checkpoint was committed for %.0f s; the storage is slow or away", lag.age_s)
            self.recorder.event("stale_checkpoint", wait=False, step=metrics["step"], **asdict(lag))
        self.committer.check()

    def _log_step(self, metrics: Mapping[str, Any]) -> None:
        """A line in the rank's log, seldom."""
        if (now := time.monotonic()) - self.logged_at >= LOG_EVERY_S:
            self.logged_at = now
            told = metrics["step"], metrics["total_steps"], metrics["loss"], metrics["step_s"]
            log.info("step %d of %d: loss %.4f, %.2f s", *told)

    def _compiled(self, step: int) -> dict[str, Any]:
        """What compiling took since the row before, if it took anything; the event says what came of it."""
        taken = self.warmup.taken()
        if taken is None:
            return {}
        self.recorder.event("compiled", wait=False, step=step, **taken._asdict())
        return {"compile_s": taken.seconds}

    def _checkpoint(self, position: Position, last: bool) -> None:
        """Every rank; the loop goes on as soon as the state is copied to the host."""
        began = time.monotonic()
        self.recorder.settle_ledger()
        state = {
            "cursor": position.cursor.to_json(),
            "world_size": self.world.size,
            "strategy": self.recipe.strategy.kind,
            TOTAL_STEPS: self.job.total_steps,
            "facts": dict(self.recorder.facts),
        }
        copying = time.monotonic()
        snapshot = self.state.snapshot(position.step, state, final=last)
        now = time.monotonic()
        self.stall_s += now - began
        if self.committer and snapshot:
            self.committer.submit(snapshot, CheckpointStall(now - began, now - copying))

    def _commit(self, snapshot: Snapshot, folder: Path) -> dict[str, Any]:
        """On the committer's thread of rank 0: write, verify, upload, commit, make room."""
        run = self.run_storage
        self.state.write(snapshot, folder)
        last = snapshot.step == self.job.total_steps
        if last:
            self._finish_folder(folder, snapshot.state["facts"])
        unique, files = put_checkpoint(run, folder, attempt=self.number, step=snapshot.step, needed=self.state.needed)
        record = CommitRecord(
            step=snapshot.step,
            attempt=self.number,
            driver=self.job.driver,
            nonce=uuid.uuid4().hex,
            checkpoint=unique,
            files=files,
            state={**snapshot.state, "base": self.base},
            committed_at=datetime.now(UTC).isoformat(),
        )
        commit(run, record)
        self.retention.apply(record)
        if last:
            publish(run, record)
        return {"uri": run.uri(layout.checkpoint(unique)), "bytes": sum(f["bytes"] for f in files.values())}

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.files.folder, trust_remote_code=self.recipe.model.trust_remote_code)

    def _finish_folder(self, folder: Path, facts: Mapping[str, Any]) -> None:
        recipe, tokenizer = self.recipe, self._tokenizer()
        if self.task.labels:
            self._finish_head(tokenizer, folder)
        tokenizer.chat_template = self.chat_template or tokenizer.chat_template
        tokenizer.save_pretrained(folder)
        provenance = read_provenance(self.run_storage)
        (folder / "README.md").write_text(model_card(recipe, facts, provenance))
        ArtifactInfo.of(recipe)._replace(base=self.base).write(folder)

    def _finish_head(self, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        """A head reads where the padding begins: whoever pads texts for it has to do it as it was done here."""
        model: Any = self.strategy.model
        base = model if self.adapter.full else model.get_base_model()
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(base.config.get_text_config().pad_token_id)
        if not self.adapter.full:
            save_head_config(base, folder)

    def _committed(self, done: Committed) -> None:
        log.info("step %d is committed: %s", done.step, done.uri)
        self.recorder.event(
            "checkpoint",
            step=done.step,
            uri=done.uri,
            stall_s=done.held.stall_s,
            snapshot_s=done.held.snapshot_s,
            upload_s=done.upload_s,
            bytes=done.bytes,
            coalesced=done.coalesced,
        )

    def _end(self, end: Position) -> Position:
        if end.step < self.job.total_steps:
            self.recorder.event("end", state="interrupted", step=end.step)
            raise Interrupted(f"stopped after step {end.step} of {self.job.total_steps}, which is committed")
        self.recorder.event("end", state="succeeded", step=end.step)
        return end
