"""How a driver leaves its run: what it failed of goes into the events, the state into the lease."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from trainer.checkpoint import read_claims
from trainer.errors import MusterError
from trainer.run.failure import said_of
from trainer.run.jsonl import Events
from trainer.run.lease import Lease
from trainer.storage import Storage

log = logging.getLogger(__name__)

DEADLINE_S = 20.0
"""How long each of the two is tried beside an error, which somebody waits to read."""


def leave(run: Storage, lease: Lease, state: str, error: BaseException | None = None) -> None:
    """Releases the lease as ``state``. Beside an ``error`` nothing is raised: it is the error that is told then, not
    that its record could not be stored either. Rank 0 has said how its attempt ended, unless it failed."""
    if error is None:
        lease.release(state)
        return
    if state == "failed":
        with _warned("the run's events do not have why it failed"):
            say_failed(run.within(DEADLINE_S), lease.driver, said_of(error))
    with _warned(f"the run's lease does not say that it has {state}"):
        lease.release(state, deadline_s=DEADLINE_S)


def say_failed(run: Storage, driver: int, cause: str) -> None:
    events = Events(run, read_claims(run).attempt, f"driver{driver}")
    events.emit("end", state="failed", cause=cause, driver=driver)
    events.close()


@contextmanager
def _warned(what: str) -> Iterator[None]:
    try:
        yield
    except MusterError as error:
        log.warning("%s: %s", what, error)
