"""What a person watching ``muster run`` sees: a live line on a terminal, plain lines elsewhere. All of it on stderr.

During training it is read from the run's storage, as anybody could, so that it shows what is really written down.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice, takewhile
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from trainer import layout
from trainer.errors import MusterError
from trainer.reporter import read_rows, rows_backwards
from trainer.storage import Storage, open_storage

if TYPE_CHECKING:
    from trainer.begin import RunData
    from trainer.data import Prepared

LOOK_S = 2.0
PLAIN_S = 10.0
WIDEST_BAR, NARROWEST_BAR = 40, 6
PACE_STEPS = 20
SHOWN_BAD_ROWS = 5


class Progress:
    """Says things to a person. ``console`` writes to stderr; whether it is a terminal decides the form."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._began = time.monotonic()

    def say(self, text: str, style: str = "") -> None:
        self.console.print(Text(text, style=style), soft_wrap=True)

    def warn(self, text: str) -> None:
        self.say(f"warning: {text}", "yellow")

    def phase(self, text: str) -> None:
        self.say(f"[{time.monotonic() - self._began:5.1f} s] {text}", "dim")

    def prepared(self, done: Any) -> None:
        self.phase(f"prepared window {done.windows} of {done.of}: {done.samples:,} samples, {done.tokens:,} tokens")

    def data(self, data: RunData) -> None:
        if not data.train.windows:
            others = data.train.count - 1
            self.say(f"data: the first window, the other {others:,} while it trains; {data.total_steps:,} steps")
            return
        totals = data.train.totals
        told = f"{totals.samples:,} samples, {totals.tokens:,} tokens ({totals.target_tokens:,} targets)"
        odd = {"truncated": totals.truncated, "dropped": totals.dropped, "bad rows": totals.bad_rows}
        told += "".join(f", {count:,} {name}" for name, count in odd.items() if count)
        self.say(f"data: {told}; {data.total_steps:,} steps")
        for prepared in filter(None, (data.train, data.eval)):
            self._bad_rows(prepared)

    def _bad_rows(self, prepared: Prepared) -> None:
        shown = prepared.bad_rows[:SHOWN_BAD_ROWS]
        for bad in shown:
            self.warn(f"left out {bad.url}, {bad.place}: {bad.reason}")
        if (more := prepared.totals.bad_rows - len(shown)) > 0:
            self.warn(f"left out {more:,} more bad rows")

    @contextmanager
    def training(
        self, run: Storage, after_attempt: int, total_steps: int, stage: Callable[[], str] = lambda: "starting workers"
    ) -> Iterator[Callable[[], None]]:
        """Yields what is to be called often while the workers train; what was written last is shown at the end.
        ``stage``: what is being waited for, until the first step."""
        # Looking must not hold up the driver: what fails now is looked at again soon.
        view = View(open_storage(run.url, deadline_s=LOOK_S), after_attempt, total_steps)
        if not self.console.is_terminal:
            plain = Plain(view, self.console, stage=stage, say_phase=self.phase)
            try:
                yield plain
            finally:
                plain(last=True)
            return
        line = LiveLine(stage=stage)
        with Live(line, console=self.console, refresh_per_second=4) as live:
            try:
                yield lambda: self._show(view, line)
            finally:
                self._show(view, line, last=True)
                live.refresh()

    def _show(self, view: View, line: LiveLine, *, last: bool = False) -> None:
        line.standing = view.look(last=last)
        for text in view.take_news():
            self.say(text)


@dataclass(frozen=True)
class Standing:
    """Where an attempt stands: the values of its line. ``saved`` is the step of the last checkpoint, if any."""

    step: int
    total_steps: int
    loss: float
    tokens_per_s: float
    left_s: float
    workers: int
    saved: int | None

    def parts(self) -> dict[str, str]:
        """Name to text, in the order of the line."""
        return {
            "step": f"step {self.step}/{self.total_steps}",
            "loss": f"loss {self.loss:.4f}",
            "tokens": f"{self.tokens_per_s:,.0f} tokens/s",
            "eta": f"ETA {duration(self.left_s)}",
            "workers": f"{self.workers} worker" + ("" if self.workers == 1 else "s"),
            "saved": "not saved yet" if self.saved is None else f"saved {self.saved}",
        }


LEAVES_FIRST = ("workers", "saved", "tokens", "eta")
GAP = "  "


def drawn(standing: Standing, width: int) -> str:
    """Two lines of at most ``width`` columns: how far it is, with a bar if there is room for one, and the values,
    without the lesser ones where they do not fit."""
    parts = standing.parts()
    first = parts.pop("step")
    bar = min(WIDEST_BAR, width - len(first) - len(GAP))
    if bar >= NARROWEST_BAR:
        filled = bar * standing.step // max(1, standing.total_steps)
        first += GAP + "━" * filled + "─" * (bar - filled)
    for name in LEAVES_FIRST:
        if len(GAP.join(parts.values())) <= width:
            break
        del parts[name]
    return f"{first[:width]}\n{GAP.join(parts.values())[:width]}"


class LiveLine:
    """What rich draws again and again on a terminal, which may have changed its width."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        stage: Callable[[], str] = lambda: "waiting for the first step",
    ) -> None:
        self.standing: Standing | None = None
        self._clock, self._began, self._stage = clock, clock(), stage

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.standing is None:
            said = f"{self._stage()}, {duration(self._clock() - self._began)}"
            yield Text(said[: options.max_width])
        else:
            yield Text(drawn(self.standing, options.max_width), no_wrap=True)


class View:
    """Where a run stands, from its newest metrics and events, read at most every ``LOOK_S`` seconds."""

    def __init__(
        self, run: Storage, after_attempt: int, total_steps: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._run, self._after, self._total, self._clock = run, after_attempt, total_steps, clock
        self._next = clock()
        self._standing: Standing | None = None
        self._news: list[str] = []
        self._seen: set[tuple[Any, ...]] = set()

    def look(self, *, last: bool = False) -> Standing | None:
        """None before the first step of this attempt. Storage that fails for a while changes nothing. ``last``: now,
        whenever the last look was."""
        if last or self._clock() >= self._next:
            self._next = self._clock() + LOOK_S
            with suppress(MusterError, FileNotFoundError):
                self._read()
        return self._standing

    def take_news(self) -> list[str]:
        """Events since the last call, as lines."""
        taken, self._news = self._news, []
        return taken

    def _read(self) -> None:
        events = [e for e in read_rows(self._run, layout.EVENTS) if e.get("attempt", 0) > self._after]
        for event in events:
            told = (event["attempt"], event.get("writer"), event.get("time"), event["event"])
            if told not in self._seen:
                self._seen.add(told)
                self._news += filter(None, [event_text(event)])
        saved = max((e["step"] for e in events if e["event"] == "checkpoint"), default=None)
        rows = (r for r in rows_backwards(self._run, layout.METRICS) if "loss" in r)
        recent = list(islice(takewhile(lambda r: r.get("attempt", 0) > self._after, rows), PACE_STEPS))
        if recent:
            self._standing = standing_of(recent, self._total, saved)


def standing_of(recent: Sequence[Mapping[str, Any]], total_steps: int, saved: int | None) -> Standing:
    """From an attempt's last metrics rows, the newest first; the time left is told by the middle one of their times."""
    newest, step = recent[0], int(recent[0]["step"])
    loss = newest["loss"]
    return Standing(
        step=step,
        total_steps=total_steps,
        loss=math.nan if loss is None else float(loss),
        tokens_per_s=float(newest.get("tokens_per_s") or 0),
        left_s=(total_steps - step) * median(float(r.get("step_s") or 0) for r in recent),
        workers=int(newest.get("world_size") or 0),
        saved=saved,
    )


class Plain:
    """Lines for logs: one every ``PLAIN_S`` seconds while the step changes, one at the end, and one per event."""

    def __init__(
        self,
        view: View,
        console: Console,
        clock: Callable[[], float] = time.monotonic,
        *,
        stage: Callable[[], str] = lambda: "",
        say_phase: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._view, self._console, self._clock = view, console, clock
        self._stage, self._say_phase, self._said = stage, say_phase, ""
        self._shown: Standing | None = None
        self._next = clock()

    def __call__(self, *, last: bool = False) -> None:
        standing = self._view.look(last=last)
        if (stage := self._stage()) != self._said and not last:
            self._said = stage
            self._say_phase(stage)
        for text in self._view.take_news():
            self._say(text)
        if standing and standing != self._shown and (last or self._clock() >= self._next):
            self._next, self._shown = self._clock() + PLAIN_S, standing
            self._say(GAP.join(standing.parts().values()))

    def _say(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)


def duration(seconds: float) -> str:
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def event_text(event: dict[str, Any]) -> str | None:
    """A line for what a person wants to know as it happens."""
    kind = event["event"]
    if kind == "start":
        where = ", ".join(f"{event['hosts'].count(h)} on {h}" for h in dict.fromkeys(event["hosts"]))
        begins = f"going on after step {event['step']}" if event["step"] else "from the first step"
        return f"attempt {event['attempt']}: workers {where}, {event['strategy']['kind']}, {begins}"
    if kind == "failure":
        return f"failure: {event['cause']}" + ("; restarting the workers" if event.get("retried") else "")
    if kind == "skipped_checkpoint":
        return f"the checkpoint of step {event['step']} is passed over: {event['reason']}"
    return None
