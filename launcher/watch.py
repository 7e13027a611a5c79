"""``muster status --watch``: what ``muster run`` shows in its terminal, from anywhere."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from launcher.drawing import GAP, age, drawn, plural
from launcher.status import Status, read_status
from launcher.tables import STATE_STYLES
from launcher.view import LOOK_S, View
from trainer.errors import MusterError
from trainer.storage import Storage

OVER = ("succeeded", "failed")
SHOWN_EVENTS = 6
PLAIN_S = 10.0


class Watch:
    """A run at a time: its status, where it stands, and what happened last. Storage that fails for a while changes
    nothing."""

    def __init__(self, run: Storage, now: Callable[[], float] = time.time) -> None:
        self._run, self._now = run, now
        self.status: Status = read_status(run, now=now(), newest=1)
        self._view = View(run, 0, self.status.total_steps, clock=now, now=now, elsewhere=True)
        self.events: deque[tuple[float, str]] = deque(maxlen=SHOWN_EVENTS)
        self.news: list[str] = []
        self.look()

    def look(self) -> None:
        with suppress(MusterError, FileNotFoundError):
            self.status = read_status(self._run, now=self._now(), newest=1)
        self.standing = self._view.look(last=True)
        dated = self._view.take_dated_news()
        self.events += dated
        self.news = [text for _, text in dated]

    @property
    def over(self) -> bool:
        return self.status.state in OVER

    def render(self, width: int) -> RenderableType:
        status = self.status
        head = Text(f"{status.name}{GAP}")
        head.append(status.state, STATE_STYLES.get(status.state, ""))
        told = [plural(status.attempts, "attempt"), status.holder or "", status.job or ""]
        head.append("".join(f"{GAP}{part}" for part in told if part))
        head.truncate(width)
        body = drawn(self.standing, width) if self.standing else "no step yet"
        lines = [Text(f"{age(self._now() - when):>6} ago{GAP}{text}"[:width]) for when, text in self.events]
        return Group(head, Text(body, no_wrap=True), *lines)


def watch_run(
    run: Storage,
    console: Console,
    *,
    now: Callable[[], float] = time.time,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Until the run has reached an end that it does not go on from. On a terminal one picture that changes, elsewhere a
    line at times."""
    watch = Watch(run, now)
    if not console.is_terminal:
        _watch_plainly(watch, console, now, sleep)
        return
    with Live(console=console, auto_refresh=False) as live:
        while True:
            live.update(watch.render(console.width), refresh=True)
            if watch.over:
                return
            sleep(LOOK_S)
            watch.look()


def _watch_plainly(watch: Watch, console: Console, now: Callable[[], float], sleep: Callable[[float], None]) -> None:
    shown: tuple[str, int] | None = None
    due = now()
    while True:
        for text in watch.news:
            console.print(Text(text), soft_wrap=True)
        state, step = watch.status.state, watch.standing.step if watch.standing else 0
        if (state, step) != shown and (now() >= due or watch.over):
            shown, due = (state, step), now() + PLAIN_S
            values = watch.standing.parts().values() if watch.standing else ["no step yet"]
            console.print(Text(GAP.join([state, *values])), soft_wrap=True)
        if watch.over:
            return
        sleep(LOOK_S)
        watch.look()


def watch_json(run: Storage, write: Callable[[str], None], sleep: Callable[[float], None] = time.sleep) -> None:
    """A line of JSON, as `muster status --json` has it, whenever something has changed."""
    before = ""
    while True:
        status = read_status(run)
        if (line := json.dumps(status.to_json())) != before:
            write(before := line)
        if status.state in OVER:
            return
        sleep(LOOK_S)
