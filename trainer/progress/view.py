"""The progress of a run, read only from its storage: what is shown is what is stored."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from statistics import median

from trainer.errors import MusterError
from trainer.progress.texts import AttemptStatus, event_text, watched_text
from trainer.redact import clean
from trainer.run import layout
from trainer.run.events import CheckpointEvent, EarlyStopEvent, EndEvent, Event, FailureEvent, StartEvent
from trainer.run.jsonl_tail import JsonLinesTail
from trainer.run.metrics import StepMetrics, read_metrics_row
from trainer.storage import Storage

LOOK_S = 2.0
PACE_STEPS = 20
CURVE_STEPS = 2000
NEWEST_PARTS = 2
"""Parts of the metrics that the first look reads: thousands of steps, and fast also for a long run."""


class View:
    """Follows the attempts that are newer than ``after``.

    It looks at the storage at most every ``LOOK_S`` seconds, and reads only new parts of the metrics and events. News
    are the events of these attempts and of ``driver``, which may fail before it has an attempt. ``elsewhere``: the
    driver prints to another screen, so its events replace its messages.
    """

    def __init__(
        self,
        run: Storage,
        after: int,
        total_steps: int,
        clock: Callable[[], float] = time.monotonic,
        *,
        driver: int | None = None,
        now: Callable[[], float] = time.time,
        elsewhere: bool = False,
    ) -> None:
        self._after, self._total, self._clock, self._now = after, total_steps, clock, now
        self._driver = driver
        self._text = watched_text if elsewhere else event_text
        self._metrics = JsonLinesTail(run, layout.METRICS, read_metrics_row, newest=NEWEST_PARTS)
        self._events = JsonLinesTail(run, layout.EVENTS, lambda row: Event.from_row(clean(row)))
        self._next = clock()
        self._rows: deque[StepMetrics] = deque(maxlen=CURVE_STEPS)
        self._eval_loss: float | None = None
        self._scores: dict[str, float] = {}
        self._hosts: tuple[str, ...] | None = None
        self._saved: tuple[int, float] | None = None
        self._cause: str | None = None
        self._ended_early = False
        self._news: list[tuple[float, str]] = []

    def look(self, *, last: bool = False) -> AttemptStatus | None:
        """Returns the progress, or None before the first step. ``last``: looks now, whenever the previous look was.

        If the storage fails, the progress stays as it was.
        """
        if last or self._clock() >= self._next:
            self._next = self._clock() + LOOK_S
            with suppress(MusterError, FileNotFoundError):
                self._take_events()
                self._take_metrics()
        return self._standing()

    def take_news(self) -> list[str]:
        """Returns the events since the last call, as lines."""
        return [text for _, text in self.take_dated_news()]

    def take_dated_news(self) -> list[tuple[float, str]]:
        """Returns the events since the last call as (Unix time, line), in order."""
        taken, self._news = sorted(self._news), []
        return taken

    def _take_events(self) -> None:
        """Reads new events. Those of earlier attempts are no news, but set the hosts and the newest checkpoint."""
        for event in sorted(self._events.new(), key=lambda event: event.time):
            if isinstance(event, FailureEvent):
                self._cause = event.cause
            elif isinstance(event, EndEvent) and event.cause == self._cause:
                event = replace(event, cause=None)  # its failure was reported
            of_driver = self._driver is not None and event.writing_driver == self._driver
            if (event.attempt > self._after or of_driver) and (text := self._text(event, self._hosts)):
                self._news.append((event.time, text))
            if isinstance(event, StartEvent):
                self._hosts, self._ended_early = event.hosts, False
            elif isinstance(event, EarlyStopEvent):
                self._ended_early = True
            elif isinstance(event, CheckpointEvent):
                self._saved = (event.step or 0, event.time)

    def _take_metrics(self) -> None:
        for row in self._metrics.new():
            if row.attempt <= self._after:
                continue
            if isinstance(row, StepMetrics):
                while self._rows and self._rows[-1].step >= row.step:
                    self._rows.pop()  # trained again after a failure
                self._rows.append(row)
            else:
                self._eval_loss = self._eval_loss if row.eval_loss is None else row.eval_loss
                self._scores = row.scores or self._scores

    def _standing(self) -> AttemptStatus | None:
        if not self._rows:
            return None
        saved = self._saved and (self._saved[0], self._now() - self._saved[1])
        recent = list(islice(reversed(self._rows), PACE_STEPS))
        losses = [row.loss for row in self._rows if row.loss is not None]
        standing = standing_of(
            recent, self._total, saved or None, losses=losses, eval_loss=self._eval_loss, hosts=self._hosts or ()
        )
        standing = replace(standing, scores=self._scores)
        return replace(standing, left_s=0.0) if self._ended_early else standing


def standing_of(
    recent: Sequence[StepMetrics],
    total_steps: int,
    saved: tuple[int, float] | None,
    *,
    losses: Sequence[float] = (),
    eval_loss: float | None = None,
    hosts: Sequence[str] = (),
) -> AttemptStatus:
    """Returns the status of an attempt from the metrics of its last steps, the newest first.

    The time left uses the median of their step times. ``saved``: the newest checkpoint's step, and its age in seconds.
    """
    newest = recent[0]
    total = newest.total_steps or total_steps
    return AttemptStatus(
        step=newest.step,
        total_steps=total,
        loss=math.nan if newest.loss is None else newest.loss,
        tokens_per_s=newest.tokens_per_s or 0.0,
        left_s=(total - newest.step) * median(row.step_s or 0.0 for row in recent),
        workers=newest.world_size or 0,
        saved=saved[0] if saved else None,
        saved_ago_s=saved[1] if saved else None,
        losses=tuple(losses),
        eval_loss=eval_loss,
        lr=newest.lr,
        grad_norm=newest.grad_norm,
        mfu=newest.mfu,
        memory_bytes=newest.memory_bytes,
        epoch=newest.epoch or 0,
        samples=newest.samples or 0,
        hosts=tuple(hosts),
    )
