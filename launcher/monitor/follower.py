"""The progress of a run, read only from its storage: what is shown is what is stored."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from statistics import median
from typing import Any

from launcher.terminal.status_text import AttemptStatus, event_text, watched_text
from trainer.errors import MusterError
from trainer.redact import clean
from trainer.run import layout
from trainer.run.jsonl_tail import JsonLinesTail
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
        self._writer = None if driver is None else f"driver{driver}"
        self._text = watched_text if elsewhere else event_text
        self._metrics = JsonLinesTail(run, layout.METRICS, newest=NEWEST_PARTS)
        self._events = JsonLinesTail(run, layout.EVENTS)
        self._next = clock()
        self._rows: deque[Mapping[str, Any]] = deque(maxlen=CURVE_STEPS)
        self._eval_loss: float | None = None
        self._hosts: tuple[str, ...] | None = None
        self._saved: tuple[int, float] | None = None
        self._cause: str | None = None
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
        for event in sorted(clean(self._events.new()), key=lambda row: float(row.get("time") or 0)):
            if event["event"] == "failure":
                self._cause = event.get("cause")
            elif event["event"] == "end" and event.get("cause") == self._cause:
                event = {**event, "cause": None}  # its failure was reported
            writer = str(event.get("writer") or "").partition("-")[0]
            is_news = int(event.get("attempt") or 0) > self._after or writer == self._writer
            if is_news and (text := self._text(event, self._hosts)):
                self._news.append((float(event.get("time") or 0), text))
            if event["event"] == "start":
                self._hosts = tuple(event.get("hosts") or ())
            elif event["event"] == "checkpoint":
                self._saved = (event.get("step") or 0, event.get("time") or 0.0)

    def _take_metrics(self) -> None:
        for row in self._metrics.new():
            if row.get("attempt", 0) <= self._after:
                continue
            if "loss" in row:
                while self._rows and self._rows[-1]["step"] >= row["step"]:
                    self._rows.pop()  # trained again after a failure
                self._rows.append(row)
            elif row.get("eval_loss") is not None:
                self._eval_loss = float(row["eval_loss"])

    def _standing(self) -> AttemptStatus | None:
        if not self._rows:
            return None
        saved = self._saved and (self._saved[0], self._now() - self._saved[1])
        recent = list(islice(reversed(self._rows), PACE_STEPS))
        losses = [float(row["loss"]) for row in self._rows if row["loss"] is not None]
        return standing_of(
            recent, self._total, saved or None, losses=losses, eval_loss=self._eval_loss, hosts=self._hosts or ()
        )


def standing_of(
    recent: Sequence[Mapping[str, Any]],
    total_steps: int,
    saved: tuple[int, float] | None,
    *,
    losses: Sequence[float] = (),
    eval_loss: float | None = None,
    hosts: Sequence[str] = (),
) -> AttemptStatus:
    """Returns the status of an attempt from its last metrics rows, the newest first.

    The time left uses the median of their step times. ``saved``: the newest checkpoint's step, and its age in seconds.
    """
    newest, step = recent[0], int(recent[0]["step"])
    loss, total = newest["loss"], int(newest.get("total_steps") or total_steps)
    return AttemptStatus(
        step=step,
        total_steps=total,
        loss=math.nan if loss is None else float(loss),
        tokens_per_s=float(newest.get("tokens_per_s") or 0),
        left_s=(total - step) * median(float(r.get("step_s") or 0) for r in recent),
        workers=int(newest.get("world_size") or 0),
        saved=saved[0] if saved else None,
        saved_ago_s=saved[1] if saved else None,
        losses=tuple(losses),
        eval_loss=eval_loss,
        lr=newest.get("lr"),
        grad_norm=newest.get("grad_norm"),
        mfu=newest.get("mfu"),
        memory_bytes=newest.get("memory_bytes"),
        epoch=int(newest.get("epoch") or 0),
        samples=int(newest.get("samples") or 0),
        hosts=tuple(hosts),
    )
