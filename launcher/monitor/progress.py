"""The output of ``muster run`` for people: a live display on a terminal, plain lines elsewhere. All of it on stderr.

During training it is read from the run's storage, so it shows what is really stored.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from trainer.progress.lines import ProgressLines
from trainer.progress.texts import AttemptStatus, drawn, duration
from trainer.progress.view import View


class Progress(ProgressLines):
    """Prints messages and progress. ``console`` writes to stderr; the form depends on whether it is a terminal."""

    def __init__(self, console: Console) -> None:
        super().__init__(lambda text, style: console.print(Text(text, style=style), soft_wrap=True))
        self.console = console

    @contextmanager
    def _following(self, view: View, stage: Callable[[], str]) -> Iterator[Callable[[], bool]]:
        if not self.console.is_terminal:
            with super()._following(view, stage) as show:
                yield show
            return
        self.phase("")  # the display has a clock of its own
        line = LiveLine(stage=stage)
        with Live(line, console=self.console, refresh_per_second=4) as live:
            try:
                yield lambda: self._show(view, line)
            finally:
                self._show(view, line, last=True)
                live.refresh()

    def _show(self, view: View, line: LiveLine, *, last: bool = False) -> bool:
        line.standing = view.look(last=last)
        for text in view.take_news():
            self.say(text)
        return line.standing is not None


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
