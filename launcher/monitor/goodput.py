"""The use of a run's wall time: a pure function of the events and metrics of all its attempts.

The wall time is from the first start to the end, or to the last sign of life. It is cut into consecutive pieces without
a gap, so the shares add up to 1. Durations come from the attempts' monotonic clocks, as recorded. Times of day, which
differ by some seconds between hosts, only place the attempts one after another. A time that two attempts claim counts
once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trainer.errors import CorruptObject
from trainer.run.events import EndEvent, Event, FailureEvent, ResizeEvent, StartEvent, StartupEvent, TextsEvent
from trainer.run.jsonl import read_events, read_metrics
from trainer.run.lease import read_lease
from trainer.run.metrics import Metrics, StepMetrics
from trainer.run.startup_phases import FIRST_STEP, PHASES
from trainer.storage import Storage

STARTING, TRAINING, EVALUATING, CHECKPOINT, COMPILING, LOST, WAITING = (
    "starting",
    "training",
    "evaluating",
    "checkpoint",
    "compiling",
    "lost",
    "waiting",
)
KINDS = (TRAINING, EVALUATING, CHECKPOINT, COMPILING, STARTING, LOST, WAITING)
"""``checkpoint``: training waited for a checkpoint, also for the last commit of an attempt. ``lost``: steps and
evaluations that a later attempt repeated, and unfinished work of an attempt that died. ``waiting``: between attempts,
without workers or without a driver."""

_UNTOLD = "untold"
"""The phase of a start that ended early: its phases were never recorded."""


@dataclass(frozen=True)
class Interval:
    """A time span in Unix seconds. ``phase``: of a start, else empty; ``attempt``: 0 if there was none."""

    begin: float
    end: float
    kind: str
    attempt: int = 0
    phase: str = ""


@dataclass(frozen=True)
class Goodput:
    """The wall time as ``pieces``, in order and without gaps; seconds by kind, and of the starts by phase."""

    pieces: tuple[Interval, ...]

    @property
    def wall_s(self) -> float:
        return self.pieces[-1].end - self.pieces[0].begin if self.pieces else 0.0

    @property
    def seconds(self) -> dict[str, float]:
        return {kind: sum(p.end - p.begin for p in self.pieces if p.kind == kind) for kind in KINDS}

    @property
    def starting(self) -> dict[str, float]:
        spent: dict[str, float] = defaultdict(float)
        for piece in self.pieces:
            if piece.kind == STARTING:
                spent[piece.phase] += piece.end - piece.begin
        return {phase: spent[phase] for phase in (*PHASES, _UNTOLD) if phase in spent}

    @property
    def share(self) -> float:
        """Returns the share of the wall time spent on training steps that no later attempt repeated."""
        return self.seconds[TRAINING] / self.wall_s if self.wall_s > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        return {"wall_s": self.wall_s, "seconds": self.seconds, "starting": self.starting, "goodput": self.share}


def goodput_of(run: Storage, *, until: float | None = None, running: bool = False) -> Goodput:
    """Reads the run's events, metrics and lease, and returns its `goodput`."""
    return goodput(read_events(run), read_metrics(run), until=until, running=running, driver=newest_driver(run))


def newest_driver(run: Storage) -> int | None:
    """Returns the number of the driver that has the run's lease, or had it last."""
    try:
        lease = read_lease(run)
    except CorruptObject:
        return None
    return lease.driver if lease else None


def goodput(
    events: Iterable[Event],
    rows: Iterable[Metrics],
    *,
    until: float | None = None,
    running: bool = False,
    driver: int | None = None,
) -> Goodput:
    """Returns the use of the run's wall time.

    ``until`` (Unix time): the last sign of life of the newest driver, whose number is ``driver``. ``running``: that
    driver is alive, so the time after the last row is current work and not lost. Both apply only to an attempt of that
    driver.
    """
    attempts = _by_attempt(events, rows)
    pieces: list[Interval] = []
    numbers = sorted(number for number, one in attempts.items() if one.lives)
    for number in numbers:
        kept = min((attempts[later].start_step for later in numbers if later > number), default=None)
        last = number == numbers[-1] and attempts[number].may_be_of(driver)
        _append(pieces, attempts[number].pieces(kept, until=until if last else None, running=running and last))
    if pieces and until is not None and until > pieces[-1].end:
        pieces.append(Interval(pieces[-1].end, until, WAITING))
    return Goodput(tuple(_joined(pieces)))


class AttemptRecord:
    """The events and metrics of one attempt."""

    def __init__(self, number: int, events: Sequence[Event], rows: Sequence[Metrics]) -> None:
        self.number = number
        by_time = sorted((event for event in events if event.time), key=lambda event: event.time)
        self.start = next((event for event in by_time if isinstance(event, StartEvent)), None)
        # A driver whose workers have not claimed an attempt yet writes events with the number of the previous attempt.
        self.events = [event for event in by_time if self.may_be_of(event.writing_driver)]
        self.startup = next((e for e in self.events if isinstance(e, StartupEvent) and e.seconds), None)
        self.rows = _timed(rows, self.start.time if self.start else None)
        self.lives = bool(self.rows) or self.start is not None

    def may_be_of(self, driver: int | None) -> bool:
        """Returns False only if the driver of the attempt is known, and ``driver`` is another one."""
        mine = self.start.driver if self.start is not None else None
        return mine is None or driver is None or mine == driver

    @property
    def start_step(self) -> int:
        """The step after which the attempt began."""
        if self.start is not None:
            return self.start.step or 0
        return min(row.step for row in self.rows) - 1

    def pieces(self, kept: int | None, *, until: float | None, running: bool) -> list[Interval]:
        """Returns the pieces in order, without gaps. A later attempt repeated the steps after ``kept``."""
        found = self._starting()
        for row in self.rows:
            begin = found[-1].end if found else row.time - row.seconds
            found += self._of_row(row, begin, kept)
        return found + self._ending(found[-1].end, until=until, running=running)

    def _starting(self) -> list[Interval]:
        """Returns the start, phase by phase. It ends where the first step begins, which counts as training."""
        first = next((row.step_s or 0.0 for row in self.rows if isinstance(row, StepMetrics)), 0.0)
        if self.startup is None:
            return self._cut_short()
        spent = dict(self.startup.seconds)
        spent[FIRST_STEP] = max(0.0, spent.get(FIRST_STEP, 0.0) - first)
        trained = min([self.startup.time, *(row.time for row in self.rows[:1])])
        at, found = trained - first - sum(spent.values()), []
        for phase, seconds in spent.items():
            if seconds > 0:
                found.append(Interval(at, at + seconds, STARTING, self.number, phase))
            at += seconds
        return found

    def _cut_short(self) -> list[Interval]:
        if self.start is None:
            return []
        started = self.start.time
        begin = started - (self.start.build_s or 0.0) - (self.start.restore_s or 0.0)
        end = max(started, self.rows[0].time - self.rows[0].seconds) if self.rows else started
        return [Interval(begin, end, STARTING, self.number, _UNTOLD)]

    def _of_row(self, row: Metrics, begin: float, kept: int | None) -> list[Interval]:
        """Splits the time since the previous row into checkpoints, compiling, and the step or the evaluation."""
        end = row.time
        if end <= begin:
            return []
        saved = min(end, begin + row.blocked_s)
        compiled = min(end, saved + (row.compile_s or 0.0))
        lost = kept is not None and row.step > kept
        work = LOST if lost else TRAINING if isinstance(row, StepMetrics) else EVALUATING
        parts = [
            Interval(begin, saved, CHECKPOINT, self.number),
            Interval(saved, compiled, COMPILING, self.number),
            Interval(compiled, end, work, self.number),
        ]
        return [piece for piece in parts if piece.end > piece.begin]

    def _ending(self, begin: float, *, until: float | None, running: bool) -> list[Interval]:
        """Returns the time after the last row: texts and last commit of an orderly end, else lost or current work."""
        later = [event for event in self.events if event.time >= begin]
        stop = next((event for event in later if isinstance(event, FailureEvent | ResizeEvent | EndEvent)), None)
        if stop is not None:
            orderly = isinstance(stop, EndEvent) and stop.state in ("succeeded", "interrupted")
            end = stop.time
            kind = CHECKPOINT if (orderly or isinstance(stop, ResizeEvent)) and self.rows else LOST
        else:
            seen = [event.time for event in self.events]
            end = max([begin, *seen, *([until] if until is not None else [])]) if running else max([begin, *seen])
            kind = TRAINING if running else LOST
        if not self.rows:
            return [Interval(begin, end, STARTING, self.number, _UNTOLD)] if end > begin else []
        texts_s = sum(event.seconds or 0.0 for event in later if isinstance(event, TextsEvent))
        wrote = min(end, begin + texts_s) if kind == CHECKPOINT else begin
        parts = [Interval(begin, wrote, EVALUATING, self.number), Interval(wrote, end, kind, self.number)]
        return [piece for piece in parts if piece.end > piece.begin]


def _by_attempt(events: Iterable[Event], rows: Iterable[Metrics]) -> dict[int, AttemptRecord]:
    happened: dict[int, list[Event]] = defaultdict(list)
    measured: dict[int, list[Metrics]] = defaultdict(list)
    for event in events:
        happened[event.attempt].append(event)
    for row in rows:
        if isinstance(row, StepMetrics) or row.eval_s is not None:
            measured[row.attempt].append(row)
    return {n: AttemptRecord(n, happened[n], measured[n]) for n in {*happened, *measured}}


def _timed(rows: Sequence[Metrics], begin: float | None) -> list[Metrics]:
    """Returns rows with increasing times. Rows of older runs have no time: it is computed from their durations."""
    at = begin
    found: list[Metrics] = []
    for row in rows:
        time = row.time or (0.0 if at is None else at + row.seconds)
        if time:
            at = time if at is None else max(at, time)
            found.append(row if row.time == at else replace(row, time=at))
    return found


def _append(pieces: list[Interval], more: Sequence[Interval]) -> None:
    """Appends an attempt to ``pieces``, with a waiting piece for a gap.

    If they overlap, the attempt's start is shortened. If its work overlaps too, a host's clock is wrong, and the
    complete attempt is moved.
    """
    if not more:
        return
    if not pieces:
        pieces.extend(more)
        return
    at = pieces[-1].end
    work = next((p.begin for p in more if p.kind != STARTING), more[-1].end)
    moved = max(0.0, at - work)
    for piece in more:
        begin, end = max(at, piece.begin + moved), piece.end + moved
        if end <= begin:
            continue
        if begin > at:
            pieces.append(Interval(at, begin, WAITING))
        pieces.append(Interval(begin, end, piece.kind, piece.attempt, piece.phase))
        at = end


def _joined(pieces: Iterable[Interval]) -> list[Interval]:
    """Joins neighbours of the same kind, attempt and phase."""
    found: list[Interval] = []
    for piece in pieces:
        if found and (found[-1].kind, found[-1].attempt, found[-1].phase) == (piece.kind, piece.attempt, piece.phase):
            found[-1] = Interval(found[-1].begin, piece.end, piece.kind, piece.attempt, piece.phase)
        else:
            found.append(piece)
    return found
