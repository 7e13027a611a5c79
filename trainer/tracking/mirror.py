"""Sends the stored metrics of a run to its trackers. It runs on the driver, next to the training.

The rows in the run's storage are the source of truth, and a mirror only reads them. So a tracker cannot delay or end
the training, and needs its library, its network and its credentials on the driver alone. Points that it missed while it
was away are sent later, also by a later attempt.

A resumed run continues the same curve, and no step appears in it twice: steps that are trained again after a failure
were sent already and are skipped. (They are the same samples, in the same order.) A tracker may know by itself how far
its curve is complete. Where it does not, the run's storage does: the mark is written *before* the points are sent, so
a driver that is killed in between leaves a gap of seconds and no doubled step.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass

from trainer.errors import CorruptObject, Interrupted
from trainer.parsing import Malformed
from trainer.recipe import Recipe, fingerprint
from trainer.recipe.trackers import TRACKERS
from trainer.records import Count, read_record
from trainer.redact import redact
from trainer.run import layout
from trainer.run.jsonl_tail import JsonLinesTail
from trainer.run.metrics import read_metrics_row
from trainer.storage import Storage
from trainer.tracking.base import START, Point, TrackedRun, Tracker, Watermark, point_of

log = logging.getLogger(__name__)

EVERY_S = 5.0
LONGEST_PAUSE_S = 300.0
POINTS_AT_ONCE = 500
PATIENCE_S = 30.0
"""Seconds that a run which has ended waits for its trackers to take the last steps."""
FAILED_PATIENCE_S = 10.0


@dataclass(frozen=True)
class Bookmark:
    """The run's record of a curve: ``of`` identifies the curve, ``step`` and ``part`` are the last point that was
    sent."""

    of: str
    id: str
    step: Count
    part: Count
    fresh: bool = False


class Mirror:
    """One tracker's thread. It calls `pump` again and again. The first error of `pump` is logged as a warning, and the
    call is repeated after a pause that doubles up to `LONGEST_PAUSE_S`."""

    def __init__(self, name: str, recipe: Recipe, run: Storage) -> None:
        self._name, self._recipe, self._run = name, recipe, run
        self._tracker: Tracker | None = None
        self._feed = JsonLinesTail(run, layout.METRICS, read_metrics_row)
        self._mark = START
        self._remembers = False
        self._id = ""
        self._failures = 0
        self._state = "interrupted"
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)

    def start(self) -> Mirror:
        self._thread.start()
        return self

    def ask(self, state: str) -> None:
        """Requests the thread to send the rest and to close the curve of a run that has ended in ``state``."""
        self._state = state
        self._closing.set()

    def wait(self, timeout_s: float) -> None:
        """Waits until the thread has ended; logs a warning when it has not ended in time."""
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            log.warning(
                "%s has not taken the last steps within %.0f s; `muster track %s` sends them",
                self._name,
                timeout_s,
                self._run.url,
            )

    def pump(self) -> int:
        """Opens the curve if it is not open, and sends the new points; returns how many."""
        tracker = self._tracker or self._open()
        ahead = list(_beyond(self._mark, filter(None, map(point_of, self._feed.new()))))
        for at in range(0, len(ahead), POINTS_AT_ONCE):
            batch = ahead[at : at + POINTS_AT_ONCE]
            if not self._remembers:
                self._note(batch[-1].mark)
            try:
                tracker.write(batch)
            except Exception:
                if not self._remembers:
                    self._note(self._mark)  # points that were refused are sent again
                raise
            self._mark = batch[-1].mark
        return len(ahead)

    def end(self, state: str) -> None:
        """Closes the curve, if it is open."""
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            try:
                tracker.close(state)
            except (Exception, SystemExit) as error:
                log.warning("the tracker %s could not be closed: %s", self._name, _first_line(error))

    def _work(self) -> None:
        while True:
            closing = self._closing.wait(self._pause_s())
            self._try()
            if closing:
                self.end(self._state)
                return

    def _pause_s(self) -> float:
        return min(LONGEST_PAUSE_S, EVERY_S * 2.0**self._failures)

    def _try(self) -> None:
        try:
            self.pump()
        except (Exception, SystemExit) as error:
            if not self._failures:
                log.warning(
                    "the tracker %s fails, and training continues without it; it is tried again: %s",
                    self._name,
                    _first_line(error),
                )
            log.debug("the tracker %s failed", self._name, exc_info=True)
            self._failures += 1
            self.end("failed")
            # A new feed reads the points again that were not sent.
            self._feed = JsonLinesTail(self._run, layout.METRICS, read_metrics_row)
        else:
            if self._failures:
                log.warning("the tracker %s works again, and has received the points that it missed", self._name)
            self._failures = 0

    def _open(self) -> Tracker:
        found = self._bookmark()
        if found is None:
            self._id, self._mark = uuid.uuid4().hex[:12], START
            self._note(START, fresh=True)
        else:
            self._id, self._mark = found.id, Watermark(found.step, found.part)
        fresh = found is None or found.fresh
        tracker: Tracker = TRACKERS.load(self._name)(TrackedRun(self._id, fresh, self._recipe, self._run))
        self._tracker = tracker
        if fresh:  # written only once the tracker is open: opening it removes an older curve of the same name
            self._note(self._mark)
        last = tracker.last_mark()
        self._remembers = last is not None
        self._mark = last or self._mark
        return tracker

    def _bookmark(self) -> Bookmark | None:
        """Returns the record of this curve. None for a new curve: the result that the recipe defines has changed (it
        may be changed until the first checkpoint), or the tracker's settings have."""
        with suppress(FileNotFoundError, CorruptObject, Malformed):
            found = read_record(Bookmark, self._run.read_json(layout.tracker(self._name)))
            if found.of == self._of():
                return found
        return None

    def _note(self, mark: Watermark, *, fresh: bool = False) -> None:
        bookmark = asdict(Bookmark(self._of(), self._id, mark.step, mark.part, fresh))
        self._run.write_json(layout.tracker(self._name), {n: v for n, v in bookmark.items() if n != "fresh" or v})

    def _of(self) -> str:
        section = getattr(self._recipe, self._name, None)
        settings = section.model_dump(mode="json") if section else {}
        return hashlib.sha256(json.dumps([fingerprint(self._recipe), settings]).encode()).hexdigest()


def _beyond(mark: Watermark, points: Iterable[Point]) -> Iterator[Point]:
    """Yields the points after ``mark``, in order; of a step that was trained twice, the first."""
    for point in points:
        if point.mark > mark:
            mark = point.mark
            yield point


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {redact(lines[0]) if lines else 'no message'}"


@contextmanager
def tracked(recipe: Recipe, run: Storage) -> Iterator[None]:
    """Mirrors the run to the recipe's trackers during the block. Never changes how the block ends."""
    mirrors = [Mirror(name, recipe, run).start() for name in dict.fromkeys(recipe.tracking)]
    state = "failed"
    try:
        yield
        state = "succeeded"
    except Interrupted:
        state = "interrupted"
        raise
    finally:
        deadline = time.monotonic() + (FAILED_PATIENCE_S if state == "failed" else PATIENCE_S)
        for mirror in mirrors:
            mirror.ask(state)
        for mirror in mirrors:
            mirror.wait(max(0.0, deadline - time.monotonic()))


def send_all(recipe: Recipe, run: Storage, state: str) -> dict[str, int]:
    """Sends every tracker of the recipe the points that it lacks of the run, which has ended in ``state``. Returns the
    number of points sent to each. Raises the errors of the trackers."""
    sent = {}
    for name in dict.fromkeys(recipe.tracking):
        mirror = Mirror(name, recipe, run)
        try:
            sent[name] = mirror.pump()
        finally:
            mirror.end(state)
    return sent
