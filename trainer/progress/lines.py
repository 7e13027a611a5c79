"""Progress as lines of text: messages, events, and a line every ``PLAIN_S`` seconds while a run trains."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from trainer.progress.texts import GAP
from trainer.progress.view import LOOK_S, View
from trainer.storage import Storage, open_storage

if TYPE_CHECKING:
    from trainer.data.prepare.prepare import PreparationProgress
    from trainer.data.run_data import RunData

PLAIN_S = 10.0
POLL_S = 0.5
BEAT_S = 5.0
"""Seconds without a line after which the current phase is printed again; more in a long phase."""
SHOWN_BAD_ROWS = 5
DATA_OF = {"train": "training", "eval": "evaluation"}


class ProgressLines:
    """Prints messages and progress. ``write(text, style)`` prints one line; ``style`` is rich's name of a colour or
    weight, or empty."""

    def __init__(self, write: Callable[[str, str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._write, self._clock = write, clock
        self._began = self._said_at = self._phase_at = clock()
        self._phase = self._dated = ""
        self._warned: set[str] = set()

    def say(self, text: str, style: str = "") -> None:
        self._said_at = self._clock()
        self._write(text, style)

    def warn(self, text: str) -> None:
        """Says each warning once."""
        if text in self._warned:
            return
        self._warned.add(text)
        self.say(f"warning: {text}", "yellow")

    def phase(self, text: str) -> None:
        """Prints the phase that begins; `repeat` prints it again until the next one. An empty text ends the phase."""
        self._phase, self._phase_at = text, self._clock()
        if text:
            self.dated(text)

    def within_phase(self, text: str) -> None:
        """Changes the text that `repeat` prints for the phase."""
        self._phase = text

    def dated(self, text: str) -> None:
        """Prints a line with the seconds since the start."""
        self._dated = text.removeprefix("still ")
        self.say(f"[{self._clock() - self._began:5.1f} s] {text}", "dim")

    def repeat(self) -> None:
        """Prints the phase again if no line was printed for long. Called often, from any thread."""
        phase, now = self._phase, self._clock()
        if phase and now - self._said_at >= max(BEAT_S, (now - self._phase_at) / 6):
            self.dated(phase if phase != self._dated else f"still {phase}")

    def prepared(self, part: str, done: PreparationProgress) -> None:
        """``part``: "train" or "eval"."""
        counts = f"{done.samples:,} samples, {done.tokens:,} tokens"
        self.dated(f"{DATA_OF[part]} data: prepared window {done.windows} of {done.of}: {counts}")

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
            for source, warnings in zip(prepared.spec.sources, prepared.warnings, strict=True):
                for text in warnings:
                    self.warn(f"{source.path}: {text}")
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
    ) -> Iterator[Callable[[], bool]]:
        """Yields a function to call often while the workers train, which returns True once they have done a step; shows
        the final progress on exit.

        ``stage``: what the run waits for, until the first step; ``driver``: the number of the driver that trains.
        """
        # A short deadline, because reading must not delay the driver; the next look tries again.
        view = View(open_storage(run.url, deadline_s=LOOK_S), after_attempt, total_steps, driver=driver)
        with self._following(view, stage) as show:
            yield show

    @contextmanager
    def _following(self, view: View, stage: Callable[[], str]) -> Iterator[Callable[[], bool]]:
        plain = Plain(view, self.say, stage=stage, say_phase=self.phase)

        def show() -> bool:
            if stepped := plain():
                self.phase("")
            return stepped

        try:
            yield show
        finally:
            self.phase("")
            plain(last=True)


class Plain:
    """Lines for logs: one every ``PLAIN_S`` seconds while the step changes, one after an evaluation, one at the end if
    the one before does not say the same, and one per event."""

    def __init__(
        self,
        view: View,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        *,
        stage: Callable[[], str] = lambda: "",
        say_phase: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._view, self._say, self._clock = view, say, clock
        self._stage, self._say_phase, self._last_stage = stage, say_phase, ""
        self._shown: tuple[int, int | None, float | None] | None = None
        self._next = clock()

    def __call__(self, *, last: bool = False) -> bool:
        """Returns True once there is a step."""
        standing = self._view.look(last=last)
        if (stage := self._stage()) != self._last_stage and not last:
            self._last_stage = stage
            self._say_phase(stage)
        for text in self._view.take_news():
            self._say(text)
        if standing is None:
            return False
        now = standing.step, standing.saved, standing.eval_loss
        step, _, eval_loss = self._shown or (None, None, None)
        due = standing.step != step and self._clock() >= self._next
        if due or standing.eval_loss != eval_loss or (last and now != self._shown):
            self._next, self._shown = self._clock() + PLAIN_S, now
            self._say(GAP.join(standing.parts().values()))
        return True


@contextmanager
def called_often(show: Callable[[], object]) -> Iterator[None]:
    """Calls ``show`` each ``POLL_S`` seconds in a thread of its own, for a main thread that trains."""
    ended = threading.Event()

    def work() -> None:
        while not ended.wait(POLL_S):
            show()

    thread = threading.Thread(target=work, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
