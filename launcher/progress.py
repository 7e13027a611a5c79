"""What a person watching ``muster run`` sees: a live line on a terminal, plain lines elsewhere. All of it on stderr.

During training it is read from the run's storage, as anybody could, so that it shows what is really written down.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from trainer import layout
from trainer.errors import MusterError
from trainer.reporter import read_rows, rows_backwards
from trainer.storage import Storage

if TYPE_CHECKING:
    from trainer.begin import RunData

LOOK_S = 2.0
PLAIN_S = 10.0
BAR = 24


class Progress:
    """Says things to a person. ``console`` writes to stderr; whether it is a terminal decides the form."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._began = time.monotonic()

    def say(self, text: str) -> None:
        self.console.print(Text(text), soft_wrap=True)

    def phase(self, text: str) -> None:
        self.console.print(Text(f"[{time.monotonic() - self._began:5.1f} s] {text}", style="dim"), soft_wrap=True)

    def prepared(self, done: Any) -> None:
        self.phase(f"prepared window {done.windows} of {done.of}: {done.samples:,} samples, {done.tokens:,} tokens")

    def data(self, data: RunData) -> None:
        totals = data.train.totals
        told = f"{totals.samples:,} samples, {totals.tokens:,} tokens ({totals.target_tokens:,} targets)"
        odd = {"truncated": totals.truncated, "dropped": totals.dropped, "bad rows": totals.bad_rows}
        told += "".join(f", {count:,} {name}" for name, count in odd.items() if count)
        self.say(f"data: {told}; {data.total_steps:,} steps")

    @contextmanager
    def training(self, run: Storage, after_attempt: int, total_steps: int) -> Iterator[Callable[[], None]]:
        """Yields what is to be called often while the workers train."""
        self.phase("starting workers")
        view = View(run, after_attempt, total_steps)
        if not self.console.is_terminal:
            yield Plain(view, self.console)
            return
        with Live(Text("starting workers"), console=self.console, refresh_per_second=4, transient=False) as live:
            yield lambda: live.update(Text(line)) if (line := view.look()) else None


class View:
    """One line about a run, from its newest metrics and events, read at most every ``LOOK_S`` seconds."""

    def __init__(
        self, run: Storage, after_attempt: int, total_steps: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._run, self._after, self._total, self._clock = run, after_attempt, total_steps, clock
        self._next = clock()
        self._line: str | None = None
        self.news: list[str] = []
        self._events_seen = 0

    def look(self) -> str | None:
        """The line, None before the first step of this attempt. Storage that fails for a while changes nothing."""
        if self._clock() >= self._next:
            self._next = self._clock() + LOOK_S
            with suppress(MusterError, FileNotFoundError):
                self._read()
        return self._line

    def _read(self) -> None:
        events = [e for e in read_rows(self._run, layout.EVENTS) if e.get("attempt", 0) > self._after]
        self.news = [text for e in events[self._events_seen :] if (text := event_text(e))]
        self._events_seen = len(events)
        saved = max((e["step"] for e in events if e["event"] == "checkpoint"), default=None)
        row: dict[str, Any] = next((r for r in rows_backwards(self._run, layout.METRICS) if "loss" in r), {})
        if row.get("attempt", 0) > self._after:
            self._line = status_line(row, self._total, saved)


class Plain:
    """Lines for logs: one every ``PLAIN_S`` seconds while the step changes, and one per event."""

    def __init__(self, view: View, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._view, self._console, self._clock = view, console, clock
        self._last: str | None = None
        self._next = clock()

    def __call__(self) -> None:
        line = self._view.look()
        for text in self._view.news:
            self._console.print(Text(text), soft_wrap=True)
        self._view.news = []
        if line and line != self._last and self._clock() >= self._next:
            self._next, self._last = self._clock() + PLAIN_S, line
            self._console.print(Text(line), soft_wrap=True)


def status_line(row: dict[str, Any], total_steps: int, saved: int | None) -> str:
    """``step 120/1000 ━━━── loss 1.234 …`` for one metrics row."""
    step = int(row["step"])
    left = (total_steps - step) * float(row.get("step_s") or 0)
    filled = BAR * step // max(1, total_steps)
    workers = row.get("world_size", 0)
    return (
        f"step {step}/{total_steps} {'━' * filled}{'─' * (BAR - filled)} loss {row['loss']:.4f}  "
        f"{row.get('tokens_per_s') or 0:,.0f} tokens/s  ETA {duration(left)}  {workers} workers  "
        + (f"checkpoint at step {saved}" if saved is not None else "no checkpoint yet")
    )


def duration(seconds: float) -> str:
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def event_text(event: dict[str, Any]) -> str | None:
    """A line for what a person wants to know as it happens."""
    kind = event["event"]
    if kind == "start":
        where = ", ".join(f"{event['hosts'].count(h)} on {h}" for h in dict.fromkeys(event["hosts"]))
        spread = event["strategy"]["kind"]
        return f"attempt {event['attempt']}: workers {where}, {spread}, going on after step {event['step']}"
    if kind == "failure":
        return f"failure: {event['cause']}" + ("; restarting the workers" if event.get("retried") else "")
    if kind == "skipped_checkpoint":
        return f"the checkpoint of step {event['step']} is passed over: {event['reason']}"
    return None
