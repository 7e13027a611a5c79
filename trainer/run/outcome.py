"""A driver's last records: the cause of a failure as an event, the state in the lease."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from trainer.errors import MusterError
from trainer.run.claims import read_claims
from trainer.run.events import EndEvent
from trainer.run.failure import message_of
from trainer.run.jsonl import Events
from trainer.run.lease import Lease
from trainer.storage import Storage

log = logging.getLogger(__name__)

DEADLINE_S = 20.0
"""Time limit of each of the two records after a failure, whose message the user is waiting for."""


def leave(run: Storage, lease: Lease, state: str, error: BaseException | None = None) -> None:
    """Releases the lease as ``state``. With an ``error`` nothing is raised, so that the caller reports the error and
    not that its record could not be stored. Without a failure, rank 0 has recorded the end of its attempt itself."""
    if error is None:
        lease.release(state)
        return
    if state == "failed":
        with _warned("the cause of the failure is not in the run's events"):
            record_failure(run.within(DEADLINE_S), lease.driver, message_of(error))
    with _warned(f"the state {state!r} is not in the run's lease"):
        lease.release(state, deadline_s=DEADLINE_S)


def record_failure(run: Storage, driver: int, cause: str) -> None:
    events = Events(run, read_claims(run).attempt, f"driver{driver}")
    events.emit(EndEvent(state="failed", cause=cause, driver=driver))
    events.close()


@contextmanager
def _warned(what: str) -> Iterator[None]:
    try:
        yield
    except MusterError as error:
        log.warning("%s: %s", what, error)
