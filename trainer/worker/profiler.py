"""Traces of a few steps by torch's profiler, into the run's storage.

`<run>/profiles/attempt-…/rank-….json.gz` is a trace that chrome://tracing, Perfetto and TensorBoard's plugin open;
`rank-….txt` has the operators that took most time. A thread writes both in the background; a failure there is a warning
and an event.
"""

from __future__ import annotations

import logging
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from trainer.distributed.world import World
from trainer.recipe import Recipe
from trainer.run import layout
from trainer.run.events import ProfiledOperator, ProfileEvent
from trainer.storage import Storage
from trainer.worker.callbacks import Callback

log = logging.getLogger(__name__)
TOP_OPERATORS = 20
IN_EVENT = 8
PATIENCE_S = 30.0


class Profiler(Callback):
    """Traces the steps and ranks that the recipe names. `close` ends a trace that the attempt's end has cut short, and
    waits for the upload. ``record`` records an event."""

    def __init__(
        self, recipe: Recipe, world: World, run: Storage, attempt: int, record: Callable[[ProfileEvent], None]
    ) -> None:
        wanted = recipe.profile.steps if world.rank in recipe.profile.ranks else ()
        self._first, self._last = wanted or (0, 0)
        self._world, self._run, self._record = world, run, record
        self._key = layout.profile(attempt, world.rank)
        self._profile: Any = None
        self._steps: list[int] = []
        self._thread: threading.Thread | None = None

    @contextmanager
    def around_step(self, step: int) -> Iterator[None]:
        """Traces the step if it is in the range; a resumed attempt traces the rest of the range."""
        if not self._first <= step <= self._last:
            yield
            return
        if self._profile is None and not self._begin():
            self._last = 0
            yield
            return
        self._steps.append(step)
        with record_function(f"step {step}"):
            yield
        if step == self._last:
            self._end()

    def close(self) -> None:
        if self._profile is not None:
            self._end()
        if self._thread is not None:
            self._thread.join(PATIENCE_S)
            if self._thread.is_alive():
                log.warning("%s was not stored within %.0f s", self._key, PATIENCE_S)

    def _begin(self) -> bool:
        activities = [ProfilerActivity.CPU]
        if self._world.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        try:
            made = profile(activities=activities, record_shapes=True)
            made.start()
        except Exception as error:  # another profiler is at work, or the driver's interface is not there
            self._failed(error)
            return False
        self._profile = made
        return True

    def _end(self) -> None:
        """Stops the profiler in the thread that started it; another thread writes the trace."""
        traced, self._profile = self._profile, None
        try:
            if self._world.device.type == "cuda":
                torch.cuda.synchronize(self._world.device)
            traced.stop()
        except Exception as error:
            self._failed(error)
            return
        self._thread = threading.Thread(target=self._store, args=(traced,), name="muster-profile", daemon=True)
        self._thread.start()

    def _store(self, traced: Any) -> None:
        # The attribute with an operator's own microseconds, without the operators that it calls.
        measure = f"self_{'device' if self._world.device.type == 'cuda' else 'cpu'}_time_total"
        try:
            averages = traced.key_averages()
            with tempfile.TemporaryDirectory(prefix="muster-profile-") as folder:
                trace = Path(folder, "trace.json.gz")
                traced.export_chrome_trace(str(trace))
                size = trace.stat().st_size
                self._run.upload(f"{self._key}.json.gz", trace)
            table = averages.table(sort_by=measure, row_limit=TOP_OPERATORS, max_name_column_width=80)
            self._run.write(f"{self._key}.txt", table.encode())
        except Exception as error:
            self._failed(error)
            return
        top = sorted(averages, key=lambda operator: -getattr(operator, measure))[:IN_EVENT]
        operators = tuple(
            ProfiledOperator(name=o.key, calls=o.count, ms=round(getattr(o, measure) / 1000, 3)) for o in top
        )
        self._report(uri=self._run.uri(f"{self._key}.json.gz"), bytes=size, operators=operators)

    def _failed(self, error: Exception) -> None:
        log.warning("no profile of rank %d: %s", self._world.rank, error)
        self._report(cause=f"{type(error).__name__}: {error}")

    def _report(self, **found: Any) -> None:
        steps = (self._steps[0], self._steps[-1]) if self._steps else ()
        try:
            self._record(ProfileEvent(rank=self._world.rank, steps=steps, **found))
        except Exception as error:  # the recorder may be closed already
            log.warning("the profile of rank %d is not recorded: %s", self._world.rank, error)
