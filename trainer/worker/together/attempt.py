"""One rank of one attempt of several runs, which train adapters of their own on one base model.

Each run is an ordinary run of the storage, with its own data order, optimizer, checkpoints, metrics and events."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from trainer.checkpoint.publish import finished
from trainer.distributed.world import World
from trainer.errors import Interrupted, NonFiniteLoss
from trainer.storage import open_storage
from trainer.worker.attempt import join, noted, opened_data, train_built
from trainer.worker.callbacks import Position
from trainer.worker.job import Job
from trainer.worker.together.build import RunSpec, build_together

log = logging.getLogger(__name__)


def train_together(jobs: Sequence[Job], stop_requested: Sequence[Callable[[], bool]]) -> None:
    """Trains the runs to their last steps; every rank of the attempt calls it. Runs that are complete are left out.

    ``stop_requested``: of each run, see `trainer.worker.attempt.train`. A run whose loss is not finite ends alone, and
    its error is raised once the others have ended. Any other error ends all of them. Raises Interrupted if a run was
    stopped before its last step. If all were requested to stop, it raises Interrupted even if the loss of one was not
    finite: that run fails again when they continue."""
    with join(jobs[0]) as (world, startup):
        storage, began = open_storage(jobs[0].storage), time.monotonic()
        left = world.decide_on_rank0(
            lambda: [
                n for n, job in enumerate(jobs) if not finished(storage.child(job.recipe.name), job.recipe.training)
            ]
        )
        if not left:
            return  # a rank died after the last commit
        jobs, stops = [jobs[n] for n in left], [stop_requested[n] for n in left]
        data = [opened_data(job, storage, startup) for job in jobs]
        with noted("loading the model"):
            specs = [RunSpec(job.recipe, d.train.spec.chat_template) for job, d in zip(jobs, data, strict=True)]
            parts, turns = build_together(specs, world, storage, lambda e: isinstance(e, NonFiniteLoss | Interrupted))
        runs: list[Callable[[], Position]] = [
            partial(train_built, job, part, d, copy.copy(startup), stop, began)
            for job, part, d, stop in zip(jobs, parts, data, stops, strict=True)
        ]
        ends = turns.run(runs, partial(_use_device, world))
        errors = {job.recipe.name: error for job, end in zip(jobs, ends, strict=True) if (error := end.exception())}
        failed = [f"run {name}: {error}" for name, error in errors.items() if isinstance(error, NonFiniteLoss)]
        stopped = [f"run {name}: {error}" for name, error in errors.items() if isinstance(error, Interrupted)]
        if stopped and (not failed or world.decide_on_rank0(lambda: all(stop() for stop in stops))):
            raise Interrupted("; ".join(stopped))
        if failed:
            raise NonFiniteLoss("\n".join(failed))


def _use_device(world: World) -> None:
    # torch's current device belongs to a thread.
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
