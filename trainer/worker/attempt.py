"""One rank of one attempt: joins the process group, builds the model, restores, trains, commits.

The same function runs under Ray Train and under torchrun. Its caller has frozen the recipe, has prepared the data (or
prepares them at the same time), and holds the run's lease.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from typing import Any

import torch

from trainer.artifacts.reward_model import reward_model
from trainer.checkpoint import claim_attempt
from trainer.data import Stream, eval_batches, open_caches
from trainer.data.run_data import RunData, open_data
from trainer.distributed.replica_nodes import placement_text, replica_nodes
from trainer.distributed.world import World, device_name, join_world
from trainer.errors import Interrupted, MusterError, note_where
from trainer.fast_imports import load_libraries
from trainer.recipe import Recipe
from trainer.run import layout
from trainer.run.events import BrokenEvent, EndEvent, HangEvent, Pulse, StartEvent
from trainer.run.failure import COLLECTIVE
from trainer.run.frozen import versions
from trainer.run.startup_phases import DATA, MODEL, WORKERS, Phases
from trainer.storage import Storage, open_storage
from trainer.worker.build import Parts, build
from trainer.worker.callbacks import Position
from trainer.worker.checkpointer import Checkpointer
from trainer.worker.hang_detector import (
    COMPILING_PATIENCE_S,
    LEAST_PATIENCE_S,
    HangDetector,
    end_culprits,
    hang_text,
    store_of_group,
)
from trainer.worker.job import Job
from trainer.worker.judge import Judge
from trainer.worker.loop import Loop
from trainer.worker.profiler import Profiler
from trainer.worker.recorder import Recorder
from trainer.worker.rollout_servers import use_servers
from trainer.worker.start.initial_weights import begin_from, begun_before
from trainer.worker.start.stored_outputs import with_outputs
from trainer.worker.start.stored_teacher import stored_teacher
from trainer.worker.telemetry import Telemetry
from trainer.worker.texts.generative_eval import GenerativeEval
from trainer.worker.texts.sample_texts import PromptSource, SampleTexts

log = logging.getLogger(__name__)

REPORTING_RANKS = 2
"""The ranks with the lowest numbers report where they last saw the others: if one of the two has died, the other is
left."""


def train(job: Job, stop_requested: Callable[[], bool]) -> Position:
    """Trains until the last step; every rank of the attempt calls it.

    ``stop_requested`` is called on every rank after each step; True on one rank ends the attempt with a commit.
    Raises Interrupted if it ended before the last step, after its state was committed.
    """
    with join(job) as (world, startup):
        storage = open_storage(job.storage)
        run = storage.child(job.recipe.name)
        began, data = time.monotonic(), opened_data(job, storage, startup)
        with noted("loading the model"):
            parts = _build(job.recipe, world, storage, run, data)
        return train_built(job, parts, data, startup, stop_requested, began)


@contextmanager
def join(job: Job) -> Iterator[tuple[World, Phases]]:
    """Joins the process group, with torch's settings of the job's recipe. Yields the group, and the phases of the
    start-up."""
    waited_s = 0.0 if job.asked_at is None else max(0.0, time.time() - job.asked_at)
    startup = Phases(time.monotonic() - waited_s, job.spent)
    load_libraries()
    torch.manual_seed(job.recipe.seed)
    torch.set_num_threads(job.recipe.resources.cpus_per_worker)
    if job.recipe.compute.tf32:
        torch.set_float32_matmul_precision("high")
    with join_world(gpu=job.recipe.resources.gpus_per_worker > 0) as world:
        startup.end(WORKERS)
        yield world, startup


def opened_data(job: Job, storage: Storage, startup: Phases) -> RunData:
    with noted("opening the data"):
        data = open_data(job.recipe, storage.child(job.recipe.name), storage.child(layout.PREPARED))
        startup.end(DATA)
    return data


def train_built(
    job: Job, parts: Parts, data: RunData, startup: Phases, stop_requested: Callable[[], bool], began: float
) -> Position:
    """Does what `train` does, with a model that is built. ``began``: when the build began, in seconds of
    `time.monotonic`."""
    recipe, world = job.recipe, parts.world
    run = open_storage(job.storage).child(recipe.name)
    with noted("opening the data"):
        cache, eval_cache = open_caches(data.train, data.eval, recipe.data.cache_bytes, parts.task.bytes_of_target())
    with noted("restoring the checkpoint"):
        attempt = world.decide_on_rank0(lambda: claim_attempt(run, job.driver, dict(job.holder)))
    recorder = Recorder(run, recipe, world, attempt)
    log.info("attempt %d: rank %d of %d on %s (%s)", attempt, world.rank, world.size, world.host, world.device)
    judge = Judge(recipe, recorder, job.total_steps)
    checkpointer = Checkpointer(job, parts, run, recorder, judge, data.train.spec.chat_template)
    detector = _hang_detector(recorder, recipe)
    with _recorded(recorder, checkpointer, detector):
        with noted("restoring the checkpoint"):
            load_s = time.monotonic() - began
            with checkpointer.newest() as found:
                checkpointer.begins_from = found.begins_from if found else _set_initial_weights(parts, recorder)
                with noted("computing outputs before training"):
                    data = with_outputs(parts, data, checkpointer.begins_from, is_initial=found is None)
                stream = Stream.of(recipe, data.train, run, cache=cache)
                start = checkpointer.restore(found, stream)
            times_s = load_s, time.monotonic() - began - load_s
            _record_start(job, parts, recorder, start, checkpointer.begins_from, *times_s)
            startup.end(MODEL)
        end = start
        if not start.over and start.step < min(job.total_steps, recipe.training.stop_after or job.total_steps):
            mine = parts.strategy.mesh.data_rank(world.rank), parts.strategy.mesh.data_ranks
            prompts = PromptSource(data.eval, eval_cache, parts.tokenizer)
            with noted("reading the questions of the evaluation"):
                answers = GenerativeEval.of(parts, recorder, prompts, detector.on_phase)
            use_servers(parts, run)  # its errors name the server
            profiler = Profiler(recipe, world, run, attempt, recorder.event_from_any_rank)
            samples = SampleTexts(parts, recorder, prompts, detector.on_phase)
            telemetry = Telemetry(recorder, checkpointer, startup, compiles=recipe.compute.compile)
            size = recipe.training.micro_batch
            evaluation = partial(eval_batches, data.eval, size, *mine, cache=eval_cache) if data.eval else None
            loop = Loop(
                parts,
                [profiler, detector, samples, telemetry, checkpointer],
                stop_requested,
                total_steps=job.total_steps,
                eval_batches=evaluation,
                judge=judge.evaluated,
                answers=answers,
            )
            batches = stream.prefetch(start.cursor, *mine)
            with closing(profiler), closing(parts.task), detector, closing(batches), noted(detector.place):
                end = loop.run(start, batches)
        checkpointer.close()
        world.all_gather(None)  # no rank leaves before the last commit is complete
        recorder.event(EndEvent(state="succeeded" if end.over else "interrupted", step=end.step))
        if not end.over:
            raise Interrupted(f"stopped after step {end.step} of {job.total_steps}, which is committed")
        return end


def _build(recipe: Recipe, world: World, storage: Storage, run: Storage, data: RunData) -> Parts:
    reward, teacher = reward_model(recipe, world.device), stored_teacher(recipe, world, data, run)
    spec = data.train.spec
    return build(recipe, world, storage, spec.labels, reward, spec.chat_template, teacher)


@contextmanager
def noted(place: str | Callable[[], str]) -> Iterator[None]:
    """Notes on an error where it was raised."""
    try:
        yield
    except Exception as error:
        note_where(error, place if isinstance(place, str) else place())
        raise


@contextmanager
def _recorded(recorder: Recorder, checkpointer: Checkpointer, detector: HangDetector) -> Iterator[None]:
    """Stores the attempt's records, also after a failure. Then it is the failure that is raised, and a record that
    cannot be stored is a warning."""
    try:
        yield
    except BaseException as error:
        try:
            # This event comes first: when a rank has died, the launcher soon ends the others.
            if recorder.world.rank < REPORTING_RANKS and COLLECTIVE.search(str(error)):
                seen = {str(rank): place for rank, place in detector.seen().items()}
                recorder.event_from_any_rank(BrokenEvent(seen=seen))
            checkpointer.drain()
            recorder.close()
        except MusterError as incomplete:
            log.warning("the records of attempt %d are not complete: %s", recorder.attempt, incomplete)
        raise
    recorder.close()


def _hang_detector(recorder: Recorder, recipe: Recipe) -> HangDetector:
    detector = HangDetector(
        recorder.world,
        store_of_group(),
        lambda found: _end_hang(found, detector, recorder),
        least_patience_s=COMPILING_PATIENCE_S if recipe.compute.compile else LEAST_PATIENCE_S,
        name=recipe.name,
    )
    return detector


def _end_hang(found: list[Pulse], detector: HangDetector, recorder: Recorder) -> None:
    """Records the hang and ends its ranks, whether or not it could be recorded."""
    try:
        hang = HangEvent(cause=hang_text(found, detector.still_s()), ranks=tuple(found))
        recorder.event_from_any_rank(hang, insist=False)
    finally:
        end_culprits(found, recorder.world.host)


def _set_initial_weights(parts: Parts, recorder: Recorder) -> Mapping[str, Any] | None:
    """Collective: loads the trained adapter that a run without a checkpoint begins from, and returns its record; None
    if it begins with new values."""
    uri = parts.recipe.adapter.begins_from
    if uri is None:
        return None
    before = parts.world.decide_on_rank0(lambda: begun_before(recorder, uri))
    begun = begin_from(parts, uri, before).to_json()
    was = before["sha256"] if before else begun["sha256"]
    if was == begun["sha256"]:
        return begun
    if parts.world.is_rank0:
        log.warning("adapter.from %s has changed since the attempt before, which had no checkpoint yet", uri)
    return {**begun, "was": was}


def _record_start(
    job: Job,
    parts: Parts,
    recorder: Recorder,
    start: Position,
    begins_from: Mapping[str, Any] | None,
    build_s: float,
    restore_s: float,
) -> None:
    """Collective."""
    log.info("built; the attempt starts after step %d", start.step)
    world, strategy = parts.world, parts.strategy
    described = strategy.describe()
    ranks = world.all_gather((world.host, os.getpid(), device_name(world.device)))
    hosts, pids, devices = zip(*ranks, strict=True)
    placed = replica_nodes(strategy.mesh, hosts)
    if placed and world.is_rank0:
        log.info("%s", placement_text(strategy.mesh, hosts))
        log.info("; ".join(f"replica {n} on {', '.join(nodes)}" for n, nodes in enumerate(placed)))
    recorder.event(
        StartEvent(
            step=start.step,
            total_steps=job.total_steps,
            driver=job.driver,
            hosts=hosts,
            replica_nodes=placed,
            pids=pids,
            devices=devices,
            versions=versions() if world.is_rank0 else {},
            world_size=world.size,
            strategy=described,
            load=parts.load,
            attention=parts.attention,
            adapted_share=parts.coverage.adapted_share,
            quantised_share=parts.coverage.quantised_share,
            trainable_parameters=strategy.trainable_elements(),
            models=parts.task.models(),
            begins_from=begins_from,
            build_s=build_s,
            restore_s=restore_s,
        )
    )
