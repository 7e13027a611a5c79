"""Where every second of a run went: a pure function over the events and metrics that all its attempts have left.

The wall time reaches from the first start to the end or the last sign of life, and is cut into pieces that follow each
other without a gap: the shares add up to 1. Durations come from the attempts' own monotonic clocks, as they wrote them
down; times of day, on which hosts disagree by some seconds, only place the attempts one after the other. What two
attempts claim both counts once.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.errors import CorruptObject
from trainer.run import layout
from trainer.run.jsonl import read_rows
from trainer.run.lease import read_lease
from trainer.run.startup_phases import FIRST_STEP, PHASES
from trainer.storage import Storage

Row = Mapping[str, Any]

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
"""``checkpoint``: what training waited for checkpoints, the last commit at an attempt's end included; ``lost``: steps
and evaluations that were done again by a later attempt, and what was under way when one died; ``waiting``: between
attempts, without workers or without a driver."""

_STOPS = ("failure", "resize", "end")
_DRIVER = re.compile(r"driver(\d+)")
"""The writer of an event, where that is not a rank but a driver."""
_UNTOLD = "untold"
"""Of a start that was cut short: its phases were never written down."""


@dataclass(frozen=True)
class Interval:
    """Unix seconds; ``phase`` of a start, else empty; ``attempt`` 0 while none was there."""

    begin: float
    end: float
    kind: str
    attempt: int = 0
    phase: str = ""


@dataclass(frozen=True)
class Goodput:
    """``pieces`` in order, without gaps; ``seconds`` of each kind, and ``starting`` of each phase of the starts."""

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
        """Of the wall time, what went into training that lasts."""
        return self.seconds[TRAINING] / self.wall_s if self.wall_s > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        return {"wall_s": self.wall_s, "seconds": self.seconds, "starting": self.starting, "goodput": self.share}


def goodput_of(run: Storage, *, until: float | None = None, running: bool = False) -> Goodput:
    """Reads all events and metrics of the run, and whose lease it is."""
    events, rows = read_rows(run, layout.EVENTS), read_rows(run, layout.METRICS)
    return goodput(events, rows, until=until, running=running, driver=newest_driver(run))


def newest_driver(run: Storage) -> int | None:
    """The number of the one that has the run's lease, or had it last."""
    try:
        lease = read_lease(run)
    except CorruptObject:
        return None
    return lease.driver if lease else None


def goodput(
    events: Iterable[Row],
    rows: Iterable[Row],
    *,
    until: float | None = None,
    running: bool = False,
    driver: int | None = None,
) -> Goodput:
    """``until`` (unix s): when the run's newest driver, whose number is ``driver``, was last heard of; ``running``:
    whether it is alive, so that what comes after the last row is work under way, not work that was lost. Of an attempt
    of an older driver it says nothing."""
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
    """What one attempt has left behind."""

    def __init__(self, number: int, events: Sequence[Row], rows: Sequence[Row]) -> None:
        self.number = number
        told = sorted((e for e in events if e.get("time") is not None), key=lambda e: float(e["time"]))
        self.start = next((e for e in told if e["event"] == "start"), None)
        # A driver whose workers have claimed no attempt yet writes under the number of the one before.
        self.events = [e for e in told if self.may_be_of(_driver_of(e))]
        self.startup = next((e for e in self.events if e["event"] == "startup" and e.get("seconds")), None)
        self.rows = _timed(rows, float(self.start["time"]) if self.start else None)
        self.lives = bool(self.rows) or self.start is not None

    def may_be_of(self, driver: int | None) -> bool:
        """Unless both are known, and it is another one's."""
        mine = self.start.get("driver") if self.start is not None else None
        return mine is None or driver is None or int(mine) == driver

    @property
    def start_step(self) -> int:
        """The step after which it went on."""
        if self.start is not None:
            return int(self.start.get("step") or 0)
        return min(int(row["step"]) for row in self.rows) - 1

    def pieces(self, kept: int | None, *, until: float | None, running: bool) -> list[Interval]:
        """In order and without gaps. Steps after ``kept`` were done again by a later attempt."""
        found = self._starting()
        for row in self.rows:
            begin = found[-1].end if found else float(row["time"]) - _length(row)
            found += self._of_row(row, begin, kept)
        return found + self._ending(found[-1].end, until=until, running=running)

    def _starting(self) -> list[Interval]:
        """Up to where the first step's own seconds begin: they are training."""
        first = next((float(r.get("step_s") or 0.0) for r in self.rows if "loss" in r), 0.0)
        if self.startup is None:
            return self._cut_short()
        spent = {phase: float(s) for phase, s in self.startup["seconds"].items()}
        spent[FIRST_STEP] = max(0.0, spent.get(FIRST_STEP, 0.0) - first)
        trained = min([float(self.startup["time"]), *(float(r["time"]) for r in self.rows[:1])])
        at, found = trained - first - sum(spent.values()), []
        for phase, seconds in spent.items():
            if seconds > 0:
                found.append(Interval(at, at + seconds, STARTING, self.number, phase))
            at += seconds
        return found

    def _cut_short(self) -> list[Interval]:
        if self.start is None:
            return []
        told = float(self.start["time"])
        begin = told - float(self.start.get("build_s") or 0) - float(self.start.get("restore_s") or 0)
        end = max(told, float(self.rows[0]["time"]) - _length(self.rows[0])) if self.rows else told
        return [Interval(begin, end, STARTING, self.number, _UNTOLD)]

    def _of_row(self, row: Row, begin: float, kept: int | None) -> list[Interval]:
        """A row's time since the one before: checkpoints, compiling, then the step with what surrounds it, or the
        evaluation."""
        end = float(row["time"])
        if end <= begin:
            return []
        saved = min(end, begin + float(row.get("stall_s") or 0.0))
        compiled = min(end, saved + float(row.get("compile_s") or 0.0))
        lost = kept is not None and int(row["step"]) > kept
        work = LOST if lost else TRAINING if "loss" in row else EVALUATING
        whole = [
            Interval(begin, saved, CHECKPOINT, self.number),
            Interval(saved, compiled, COMPILING, self.number),
            Interval(compiled, end, work, self.number),
        ]
        return [piece for piece in whole if piece.end > piece.begin]

    def _ending(self, begin: float, *, until: float | None, running: bool) -> list[Interval]:
        """From the last row on: the last commit where the attempt ended by itself, else work that was lost."""
        stops = [e for e in self.events if e["event"] in _STOPS and float(e["time"]) >= begin]
        if stops:
            end, stop = float(stops[0]["time"]), stops[0]
            orderly = stop["event"] == "resize" or stop.get("state") in ("succeeded", "interrupted")
            kind = CHECKPOINT if orderly and self.rows else LOST
        else:
            told = [float(e["time"]) for e in self.events]
            end = max([begin, *told, *([until] if until is not None else [])]) if running else max([begin, *told])
            kind = TRAINING if running else LOST
        if not self.rows:
            return [Interval(begin, end, STARTING, self.number, _UNTOLD)] if end > begin else []
        wrote = min(end, begin + self._written_s(begin)) if kind == CHECKPOINT else begin
        whole = [Interval(begin, wrote, EVALUATING, self.number), Interval(wrote, end, kind, self.number)]
        return [piece for piece in whole if piece.end > piece.begin]

    def _written_s(self, after: float) -> float:
        """What the texts after the last step took."""
        texts = [e for e in self.events if e["event"] == "texts" and float(e["time"]) >= after]
        return sum(float(e.get("seconds") or 0.0) for e in texts)


def _driver_of(event: Row) -> int | None:
    """None of an event that a rank has written."""
    match = _DRIVER.match(str(event.get("writer") or ""))
    return int(match[1]) if match else None


def _by_attempt(events: Iterable[Row], rows: Iterable[Row]) -> dict[int, AttemptRecord]:
    told: dict[int, list[Row]] = defaultdict(list)
    measured: dict[int, list[Row]] = defaultdict(list)
    for event in events:
        told[int(event.get("attempt") or 0)].append(event)
    for row in rows:
        if row.get("step") is not None and ("loss" in row or "eval_s" in row):
            measured[int(row.get("attempt") or 0)].append(row)
    return {n: AttemptRecord(n, told[n], measured[n]) for n in {*told, *measured}}


def _timed(rows: Sequence[Row], begin: float | None) -> list[Row]:
    """Rows with their times. Those of older runs have none: they follow from the seconds that each took."""
    at = begin
    found: list[Row] = []
    for row in rows:
        time = row.get("time")
        if time is None and at is not None:
            time = at + _length(row)
        if time is not None:
            at = float(time) if at is None else max(at, float(time))
            found.append({**row, "time": at})
    return found


def _length(row: Row) -> float:
    return sum(float(row.get(name) or 0.0) for name in ("step_s", "eval_s", "stall_s"))


def _append(pieces: list[Interval], more: Sequence[Interval]) -> None:
    """Puts an attempt after those before it. Where they overlap, its start gives way; if its work does too, one of the
    hosts' clocks is wrong, and the attempt is moved as a whole."""
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
    """Neighbours of one kind, attempt and phase become one."""
    found: list[Interval] = []
    for piece in pieces:
        if found and (found[-1].kind, found[-1].attempt, found[-1].phase) == (piece.kind, piece.attempt, piece.phase):
            found[-1] = Interval(found[-1].begin, piece.end, piece.kind, piece.attempt, piece.phase)
        else:
            found.append(piece)
    return found
