"""The output of ``muster run`` for people: a live display on a terminal, plain lines elsewhere. All of it on stderr.

During training it is read from the run's storage, so it shows what is really stored.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from launcher.monitor.follower import LOOK_S, View
from launcher.terminal.status_text import GAP, AttemptStatus, drawn, duration
from trainer.storage import Storage, open_storage

if TYPE_CHECKING:
    from trainer.data.run_data import RunData

PLAIN_S = 10.0
SHOWN_BAD_ROWS = 5


class Progress:
    """Prints messages and progress. ``console`` writes to stderr; the form depends on whether it is a terminal."""

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
            self.say(f"data: the first window, the other {others:,} during training; {data.total_steps:,} steps")
            return
        totals = data.train.totals
        text = f"{totals.samples:,} samples, {totals.tokens:,} tokens ({totals.target_tokens:,} targets)"
        odd = {"truncated": totals.truncated, "dropped": totals.dropped, "bad rows": totals.bad_rows}
        text += "".join(f", {count:,} {name}" for name, count in odd.items() if count)
        self.say(f"data: {text}; {data.total_steps:,} steps")
        for prepared in filter(None, (data.train, data.eval)):
            shown = prepared.bad_rows[:SHOWN_BAD_ROWS]
            for bad in shown:
                self.warn(f"left out {bad.url}, {bad.place}: {bad.reason}")
            if (more := prepared.totals.bad_rows - len(shown)) > 0:
                self.warn(f"left out {more:,} more bad rows")

    @contextmanager
    def training(
        self,
        run: Storage,
        after_attempt: int,
        total_steps: int,
        stage: Callable[[], str] = lambda: "starting workers",
        driver: int | None = None,
    ) -> Iterator[Callable[[], None]]:
        """Yields a function to call often while the workers train; shows the final progress on exit.

        ``stage``: what the run waits for, until the first step; ``driver``: the number of the driver that trains.
        """
        # A short deadline, because reading must not delay the driver; the next look tries again.
        view = View(open_storage(run.url, deadline_s=LOOK_S), after_attempt, total_steps, driver=driver)
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


class LiveLine:
    """The live display that rich draws repeatedly, each time for the current width of the terminal."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        stage: Callable[[], str] = lambda: "waiting for the first step",
    ) -> None:
        self.standing: AttemptStatus | None = None
        self._clock, self._began, self._stage = clock, clock(), stage

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.standing is None:
            text = f"{self._stage()}, {duration(self._clock() - self._began)}"
            yield Text(text[: options.max_width])
        else:
            yield Text(drawn(self.standing, options.max_width), no_wrap=True)


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
        self._stage, self._say_phase, self._last_stage = stage, say_phase, ""
        self._shown: int | None = None
        self._next = clock()

    def __call__(self, *, last: bool = False) -> None:
        standing = self._view.look(last=last)
        if (stage := self._stage()) != self._last_stage and not last:
            self._last_stage = stage
            self._say_phase(stage)
        for text in self._view.take_news():
            self._say(text)
        if standing and standing.step != self._shown and (last or self._clock() >= self._next):
            self._next, self._shown = self._clock() + PLAIN_S, standing.step
            self._say(GAP.join(standing.parts().values()))

    def _say(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)
