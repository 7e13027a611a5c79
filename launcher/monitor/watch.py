"""``muster status --watch``: the display of ``muster run``, from any machine."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from textwrap import wrap

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from launcher.monitor.status import Status, read_status
from launcher.monitor.tables import STATE_STYLES
from trainer.errors import MusterError
from trainer.progress.texts import GAP, age, drawn, plural
from trainer.progress.view import LOOK_S, View
from trainer.redact import clean
from trainer.storage import Storage

OVER = ("succeeded", "failed")
SHOWN_EVENTS = 6
PLAIN_S = 10.0
EVERY_ATTEMPT = -1
"""Less than 0, because a failure before the first attempt has attempt number 0."""
NARROWEST_TEXT = 20


class Watch:
    """One run: its status, its progress and its last events. If the storage fails, they stay as they were."""

    def __init__(self, run: Storage, now: Callable[[], float] = time.time) -> None:
        self._run, self._now = run, now
        self.status: Status = read_status(run, now=now(), newest=1)
        self._view = View(run, EVERY_ATTEMPT, self.status.total_steps, clock=now, now=now, elsewhere=True)
        self.events: deque[tuple[float, str]] = deque(maxlen=SHOWN_EVENTS)
        self.news: list[str] = []
        self.look()

    def look(self) -> None:
        with suppress(MusterError, FileNotFoundError):
            self.status = read_status(self._run, now=self._now(), newest=1)
        standing = self._view.look(last=True)
        self.standing = standing and replace(standing, running=self.status.state == "running")
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
        parts = [plural(status.attempts, "attempt"), status.holder or "", status.job or ""]
        for part in filter(None, parts):  # a name that does not fit has a line of its own
            room = width - len(head.plain.rsplit("\n", 1)[-1])
            head.append(f"{GAP}{part}" if len(GAP) + len(part) <= room else f"\n{part}")
        body = drawn(self.standing, width) if self.standing else "no step yet"
        lines = [Text(event_lines(age(self._now() - when), text, width)) for when, text in self.events]
        return Group(head, Text(body, no_wrap=True), *lines)

    def failure(self) -> Text | None:
        """Returns the newest failure with cause, stack and advice; None if there is none or the run has succeeded."""
        if (failure := self.status.failure) is None:
            return None
        ago = age(self._now() - float(failure.get("time") or 0))
        after = ", after which the workers were started again" if failure.get("retried") else ""
        parts = [failure.get(name) for name in ("cause", "trace", "advice")]
        return Text("\n".join([f"failure {ago} ago{after}:", *(str(part) for part in parts if part)]))


def event_lines(ago: str, text: str, width: int) -> str:
    """Returns the complete event, wrapped into as many lines as it needs: its end may be important."""
    head = f"{ago:>6} ago{GAP}"
    room = max(NARROWEST_TEXT, width - len(head))
    lines = [line for part in text.splitlines() for line in wrap(part, room)]
    return f"\n{' ' * len(head)}".join([head + lines[0], *lines[1:]]) if lines else head


def watch_run(
    run: Storage,
    console: Console,
    *,
    now: Callable[[], float] = time.time,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Shows the run until it has succeeded or failed: a live display on a terminal, plain lines elsewhere."""
    watch = Watch(run, now)
    if not console.is_terminal:
        _watch_plainly(watch, console, now, sleep)
        print_failure(watch, console)
        return
    with Live(console=console, auto_refresh=False) as live:
        while True:
            live.update(watch.render(console.width), refresh=True)
            if watch.over:
                break
            sleep(LOOK_S)
            watch.look()
    print_failure(watch, console)


def print_failure(watch: Watch, console: Console) -> None:
    if (failure := watch.failure()) is not None:
        console.print(failure, soft_wrap=True)  # unwrapped lines can be copied and searched


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
    """Writes a line of JSON, like `muster status --json`, at each change, until the run has succeeded or failed.

    A new sign of life of the driver alone is not a change. A storage that fails for a while does not end it.
    """
    status, before = read_status(run), None
    while True:
        if (content := replace(status, heard_at=None, seen_at=None)) != before:
            before = content
            write(json.dumps(clean(status.to_json())))
        if status.state in OVER:
            return
        sleep(LOOK_S)
        with suppress(MusterError, FileNotFoundError):
            status = read_status(run)
