"""One attempt: what each of its workers does, and how it ends. Without Ray."""

from __future__ import annotations

import logging
import os
import time
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from trainer.errors import InputError
from trainer.run.failure import Failure, WorkerError, useful_stack

if TYPE_CHECKING:
    from trainer.worker.job import Job

log = logging.getLogger(__name__)

_DIED = " died: "


class ResizeRequested(Exception):
    """The workers have committed and ended; they start again on the nodes that are there now."""


class AttemptFailed(Exception):
    """An attempt has ended with an error. ``starting``: before its workers began."""

    def __init__(self, cause: Failure, starting: bool = False) -> None:
        super().__init__(cause, starting)
        self.cause, self.starting = cause, starting

    def __str__(self) -> str:
        return self.cause.message


def run_rank(job: Job, rank: int, ranks: int) -> None:
    """Trains as one rank of an attempt of ``ranks``. Raises ResizeRequested, or WorkerError for anything else."""
    try:
        _train(job, rank, ranks)
    except ResizeRequested:
        raise
    except Exception as error:
        raise WorkerError.of(error, time.time(), rank, os.uname().nodename, useful_stack(error)) from None


def run_packed(job: dict[str, Any], rank: int, ranks: int) -> None:
    """Does this with a packed job. Raises WorkerError where a plug-in of its recipe is not installed."""
    from trainer.worker.job import Job

    try:
        unpacked = Job.unpacked(job)
    except Exception as error:
        missing = InputError(f"a plug-in of the recipe cannot be imported on this host: {error}")
        raise WorkerError.of(missing, time.time(), rank, os.uname().nodename, "") from None
    run_rank(unpacked, rank, ranks)


def _train(job: Job, rank: int, ranks: int) -> None:
    from trainer.errors import Interrupted
    from trainer.logs.rank import rank_log
    from trainer.run.stop_poller import StopPoller
    from trainer.storage import open_storage
    from trainer.worker.attempt import train
    from trainer.worker.together.attempt import train_together

    storage = open_storage(job.storage)
    with ExitStack() as stack:
        polled = [(storage.child(one.recipe.name), one.driver) for one in job.runs]
        watches = [stack.enter_context(StopPoller(run, driver, enabled=rank == 0)) for run, driver in polled]
        try:
            with rank_log(storage.child(job.recipe.name), rank, ranks):
                if job.others:
                    train_together(job.runs, [watch.stop_requested for watch in watches])
                else:
                    train(job, watches[0].stop_requested)
        except Interrupted as stopped:
            log.info("%s", stopped)
            if any(watch.resize for watch in watches):
                raise ResizeRequested(str(stopped)) from None


def death(rank: int, how: str) -> Failure:
    """Returns the failure of a rank whose process has gone."""
    return Failure(f"rank {rank}{_DIED}{how}", rank, died=True)


def placed_death(cause: Failure, host: str | None, seen: str, step: int | None) -> Failure:
    """The death of a rank, with its host, and with where others last saw it, or else the last ``step`` that the run
    had done."""
    rank, _, line = cause.message.partition(_DIED)
    where = f"last seen at {seen}" if seen else f"after step {step}" if step else ""
    text = f"{rank}{f' on {host}' if host else ''} died{f' ({where})' if where else ''}: {line}"
    return replace(cause, message=text, host=host, where=seen)
