"""What a rank says when it fails under torchrun, where no driver hears of all of them.

The rank that failed first writes the event, and rank 0, whose collectives break a moment later, looks for it: so that
the last lines of the command and the run's events tell the cause, not what followed from it.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from trainer.advice import advise
from trainer.checkpoint import read_claims
from trainer.ending import DEADLINE_S
from trainer.errors import MusterError, WorkerFailed
from trainer.failure import Cause, Failure, useful_stack
from trainer.recipe import Recipe
from trainer.reporter import Events, newest_failure
from trainer.storage import Storage

log = logging.getLogger(__name__)

OTHERS_S = 5.0
"""How long rank 0 waits to hear of another rank's failure, when its own may have followed from that."""
AFTER_S = 1.0
"""What the other ranks leave rank 0 to write down what all of them have met alike."""
_POLL_S = 0.5


class RankFailed(WorkerFailed):
    """Of something that no error of this program's foresees: whoever has started the ranks may start them again."""


class Rank(NamedTuple):
    """A rank of a run; ``driver`` is the number that rank 0 holds the run by, and None on the others."""

    run: Storage
    recipe: Recipe
    rank: int
    driver: int | None


def told(error: Exception, of: Rank, sleep: Callable[[float], None] = time.sleep) -> MusterError:
    """What is to be raised in the place of ``error``: with rank, host and phase, the lines of the stack that matter,
    and what to try next. It is kept with the run, as far as the storage answers."""
    cause = Failure.of(error, time.time(), of.rank, os.uname().nodename, useful_stack(error)).cause
    advice = advise(cause, of.recipe, of.run.url)
    said = cause.as_error(advice)
    try:
        other = _kept(cause, advice, of, sleep)
    except MusterError as unkept:
        log.warning("the failure is not in the run's events: %s", unkept)
        other = None
    if other is not None:
        return RankFailed(*(str(other[name]) for name in ("cause", "trace", "advice") if other.get(name)))
    return said if isinstance(error, MusterError) else RankFailed(*said.args)


def _kept(cause: Cause, advice: str, of: Rank, sleep: Callable[[float], None]) -> Mapping[str, Any] | None:
    """Writes the failure down, unless another rank's has been; on rank 0 returns that one if it is the cause."""
    run, first = of.run.within(DEADLINE_S), of.driver is not None
    claims = read_claims(run)
    driver = claims.driver if of.driver is None else of.driver
    if first and cause.by_another:
        other = _others(run, driver, sleep)
        if other is not None:
            return other
    elif not first:
        if cause.by_another:
            return None
        sleep(AFTER_S)
        if newest_failure(run, driver) is not None:
            return None
    writer = f"driver{driver}" if first else f"driver{driver}-rank{of.rank}"
    events = Events(run, claims.attempt, writer)
    events.emit("failure", **cause.facts(advice), retried=_is_retried(), driver=driver)
    events.close()
    return None


def _others(run: Storage, driver: int, sleep: Callable[[float], None]) -> Mapping[str, Any] | None:
    for _ in range(round(OTHERS_S / _POLL_S)):
        if (found := newest_failure(run, driver)) is not None:
            return found
        sleep(_POLL_S)
    return None


def _is_retried() -> bool:
    """Whether torchrun will start its ranks again."""
    done, most = (int(os.environ.get(f"TORCHELASTIC_{name}", "0")) for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    return done < most
