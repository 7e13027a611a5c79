"""Holds a run for its driver: trackers follow it, and its end is recorded in the lease and in the events."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from trainer.checkpoint.publish import finished
from trainer.errors import Interrupted, WorkerFailed
from trainer.interruption import Terminated, current
from trainer.recipe import Recipe
from trainer.run.lease import Lease
from trainer.run.outcome import leave
from trainer.storage import Storage
from trainer.tracking import tracked


def interrupted(error: BaseException) -> bool:
    """Returns True for an error that only says that the run was stopped."""
    return isinstance(error, Interrupted | KeyboardInterrupt | Terminated)


@contextmanager
def hold_run(
    recipe: Recipe, run: Storage, lease: Lease, *, stopped: Callable[[BaseException], bool] = interrupted
) -> Iterator[None]:
    """Trains the run in the block, which must commit its last step. Releases the lease with the state that the run is
    in: ``succeeded``, ``interrupted`` after an error that ``stopped`` accepts, else ``failed``. Raises WorkerFailed if
    the block ends without the last commit. Called by the driver on Ray, and by rank 0 under torchrun."""
    try:
        with tracked(recipe, run):
            yield
            if finished(run, recipe.training) is None:
                raise WorkerFailed(
                    f"the workers exited without an error, but the last step of {run.url} was never committed"
                )
    except BaseException as error:
        current.unwinding()
        leave(run, lease, "interrupted" if stopped(error) else "failed", error)
        raise
    current.unwinding()
    leave(run, lease, "succeeded")
