"""Reports the first failure of a group of ranks under torchrun, where no driver sees all of them.

The rank that failed first records the event. Rank 0, whose collectives break a moment later, looks for that event, so
that the command's last lines and the run's events show the cause and not its consequences.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from trainer.checkpoint import read_claims
from trainer.errors import MusterError, WorkerFailed
from trainer.recipe import Recipe
from trainer.run.events import EndEvent, FailureEvent, HangEvent
from trainer.run.failure import Failure, WorkerError, useful_stack
from trainer.run.jsonl import Events, newest_event, newest_failure
from trainer.run.outcome import DEADLINE_S
from trainer.run.symptoms import advise
from trainer.storage import Storage

log = logging.getLogger(__name__)

PEER_FAILURE_WAIT_S = 5.0
"""Rank 0 waits so long for another rank's failure, if its own may be a consequence."""
RANK0_GRACE_S = 1.0
"""The other ranks wait so long for rank 0 to record a failure that all of them may have."""
_POLL_S = 0.5


class RankFailed(WorkerFailed):
    """An unexpected exception on a rank (torchrun). Retryable."""


class RunRank(NamedTuple):
    """A rank of a run. ``driver``: the driver number of the lease on rank 0, None on the others."""

    run: Storage
    recipe: Recipe
    rank: int
    driver: int | None


def explain_failure(error: Exception, of: RunRank, sleep: Callable[[float], None] = time.sleep) -> MusterError:
    """Returns the exception to raise instead of ``error``: with rank, host, phase, the relevant lines of the stack and
    advice. Records the failure in the run's events, if the storage answers."""
    cause = WorkerError.of(error, time.time(), of.rank, os.uname().nodename, useful_stack(error)).cause
    try:
        told = _of_first(cause, of, sleep) if of.driver is not None else _of_other(cause, of, sleep)
    except MusterError as unkept:
        log.warning("the failure is not in the run's events: %s", unkept)
        told = _event(cause, of)
    if isinstance(error, MusterError):
        return cause.as_error()
    details = (told.trace, told.advice) if isinstance(told, FailureEvent) else ()
    return RankFailed(*filter(None, (told.cause, *details)))


def _event(cause: Failure, of: RunRank) -> FailureEvent:
    # torchrun starts its ranks again until it has done so as often as it may.
    done, most = (int(os.environ.get(f"TORCHELASTIC_{name}", "0")) for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    return cause.event(advise(cause, of.recipe, of.run.url), retried=done < most, driver=of.driver)


def _of_first(cause: Failure, of: RunRank, sleep: Callable[[float], None]) -> FailureEvent | EndEvent:
    """Returns, on rank 0, another rank's failure or a hang if its own may be a consequence, and else its own."""
    assert of.driver is not None
    run = of.run.within(DEADLINE_S)
    attempt = read_claims(run).attempt
    if cause.by_another:
        for _ in range(round(PEER_FAILURE_WAIT_S / _POLL_S)):
            if (other := newest_failure(run, of.driver)) is not None:
                return other
            sleep(_POLL_S)
        if (hang := newest_event(run, attempt, HangEvent)) is not None:
            cause = cause.of_hang(hang)
    return _keep(_event(cause, of), run, attempt, f"driver{of.driver}")


def _of_other(cause: Failure, of: RunRank, sleep: Callable[[float], None]) -> FailureEvent:
    """Returns, on another rank, its own failure, which is recorded if it may be the first."""
    event, run = _event(cause, of), of.run.within(DEADLINE_S)
    if cause.by_another:
        return event
    sleep(RANK0_GRACE_S)
    claims = read_claims(run)
    if newest_failure(run, claims.driver) is not None:
        return event
    of_driver = replace(event, driver=claims.driver)
    return _keep(of_driver, run, claims.attempt, f"driver{claims.driver}-rank{of.rank}")


def _keep(event: FailureEvent, run: Storage, attempt: int, writer: str) -> FailureEvent:
    events = Events(run, attempt, writer)
    events.emit(event)
    events.close()
    return event
