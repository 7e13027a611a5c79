"""Starts Ray and waiting workers while the driver checks the inputs and prepares the data.

If there is room for all workers at once, they start as soon as Ray answers. Otherwise, and if preparing the data may
use every CPU for long, the driver starts them later. Ray itself is joined or started before anything else: it forks its
processes, and a child of a process whose other threads are in the middle of imports may crash before it has become what
it was to be (seen in Python 3.11).
"""

from __future__ import annotations

import logging
import threading
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from launcher.raytrain.environment import Environment
from launcher.raytrain.handoff import JobHandoff
from trainer.errors import MusterError
from trainer.interruption import current
from trainer.recipe import Recipe
from trainer.run.frozen import has_commits
from trainer.run.lease import read_lease
from trainer.run.startup_phases import Phases
from trainer.storage import Storage

if TYPE_CHECKING:
    from launcher.raytrain.trainer import Fit

log = logging.getLogger(__name__)

LEAVE_S = 4.0
READY_S = 600.0


class Standby:
    """Entered before the inputs are checked; `joined` waits for Ray, and raises why there is none."""

    def __init__(self, recipe: Recipe, run: Storage, address: str | None, phases: Phases) -> None:
        self.order = JobHandoff(phases)
        self._recipe, self._run, self._address = recipe, run, address
        self._fit: Fit | None = None
        self._error: BaseException | None = None
        self._session: AbstractContextManager[None] | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._begin, name="workers-start", daemon=True)

    def __enter__(self) -> Standby:
        from launcher.raytrain.session import ray_session, set_up

        set_up(self._address)
        self._session = ray_session(self._address, self._recipe.resources)
        # Here and now: two threads that import parts of one library at once may meet it half made.
        import launcher.raytrain.trainer  # noqa: F401

        try:
            self._session.__enter__()
        except Exception as error:  # said once the inputs are known to be right
            self._error, self._session = error, None
            self._ready.set()
        else:
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        ended = self._ready.wait(LEAVE_S)
        if self._fit is not None:
            ended = self._fit.leave(LEAVE_S) and ended
        if not ended:
            current.abandon()  # Ray ends a process with exit code 1 when it is used after its shutdown
        if self._session is not None:
            self._session.__exit__(None, None, None)

    @property
    def waiting(self) -> bool:
        """True if workers wait for the job."""
        return self._fit is not None

    def joined(self) -> None:
        if not self._ready.wait(READY_S):
            raise MusterError(f"the workers have not been started within {READY_S / 60:g} minutes; look at the cluster")
        if self._error is not None:
            raise self._error

    def workers(self) -> Fit:
        """Returns the pre-started worker group if it is alive, else a new one."""
        if self._fit is None or self._fit.wait(0):
            self._fit = self._start()
        return self._fit

    def _start(self) -> Fit:
        from launcher.raytrain.trainer import Fit

        return Fit(self._recipe, self.order, Environment.current(), autoscaled=self._address is not None)

    def _begin(self) -> None:
        try:
            if self._may_begin() and self._room():
                self._fit = self._start()
        except Exception:  # they are started later, and what is wrong is said then
            log.debug("no workers were started ahead", exc_info=True)
        finally:
            self._ready.set()

    def _may_begin(self) -> bool:
        """Returns False if another driver holds the run, or if GPUs would wait until all data are prepared."""
        recipe = self._recipe
        try:
            lease = read_lease(self._run)
            if lease is not None and lease.may_be_alive():
                return False
            return recipe.training.steps is not None or not recipe.resources.gpus_per_worker or has_commits(self._run)
        except MusterError:
            return False

    def _room(self) -> bool:
        from launcher.raytrain.nodes import nodes_of_cluster, room

        return room(self._recipe.resources, nodes_of_cluster(), {}) >= self._recipe.resources.max_workers
