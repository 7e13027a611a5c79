"""A hang names its rank: every rank tells the others where it is, and the first sound one acts when nobody moves.

Each rank writes a *pulse* (step, phase, how far it has come, its main thread's stack) to the process group's store
every ``BEAT_S`` seconds, from a thread of its own. When no rank has moved for the patience (five times the 99th
percentile of the step times so far, at least ``LEAST_PATIENCE_S``), those that hold the others up are

- rank 0, where the store itself does not answer, which its process keeps; or else
- the ranks whose pulse itself stopped (a stopped process, a dead host), or else
- the ranks that have come least far: the others wait for them in a collective. Waiting for storage gets half an hour:
  each call has a deadline of its own and says so itself when it passes, but a phase may be many calls.

The lowest rank that is not among them reports it and ends them (or, where they are on another host, itself), so that
whoever started the group starts it again from the newest checkpoint.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any, Protocol

from trainer.data import Batch
from trainer.storage.backend import NoAnswer
from trainer.storage.limit import limited
from trainer.worker.callbacks import Callback

BEAT_S = 1.0
STALE_S = 10.0
LEAST_PATIENCE_S = 30.0
COMPILING_PATIENCE_S = 600.0
"""Where layers are compiled: shapes or modes that come for the first time take a rank that long, at any step."""
FIRST_PATIENCE_S = 1800.0
RECENT_STEPS = 200
STACK_FRAMES = 12
WAITING_FOR_DATA, CHECKPOINT = "waiting for data", "checkpoint"
STORAGE_PHASES = (WAITING_FOR_DATA, CHECKPOINT)
STORAGE_PATIENCE_S = 1800.0


@dataclass(frozen=True)
class Pulse:
    """``moves`` counts phases entered since the start; ``beat`` counts pulses."""

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    moves: int
    beat: int
    stack: str = ""

    @property
    def place(self) -> str:
        return f"step {self.step}, {self.phase}"

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} (process {self.pid}), {self.place}"


class PulseStore(Protocol):
    """What is needed of ``torch.distributed.Store``: no more, so that a test's dictionary will do."""

    def set(self, key: str, value: str) -> None: ...
    def check(self, keys: list[str]) -> bool: ...
    def get(self, key: str) -> bytes: ...


@dataclass(frozen=True)
class Seen:
    """A pulse and when, by this rank's clock, its beat and its moves were last seen to change."""

    pulse: Pulse
    beat_at: float
    moved_at: float


def patience_s(step_times: Sequence[float], least_s: float = LEAST_PATIENCE_S) -> float:
    """How long nobody may move: max(5 p99 of a step, ``least_s``), and half an hour until the first step is done."""
    if not step_times:
        return FIRST_PATIENCE_S
    ordered = sorted(step_times)
    return max(least_s, 5 * ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))])


def culprits(seen: Mapping[int, Seen], now: float, patience: float) -> list[Pulse]:
    """The ranks that hold the others up; empty while anybody moves, or when all came equally far and still beat, unless
    what they all wait for is storage."""
    if not seen or any(now - s.moved_at < patience for s in seen.values()):
        return []
    silent = [s.pulse for s in seen.values() if now - s.beat_at >= STALE_S]
    if silent:
        return silent
    least = min(s.pulse.moves for s in seen.values())
    behind = [s.pulse for s in seen.values() if s.pulse.moves == least]
    if any(p.phase in STORAGE_PHASES for p in behind):
        return behind if all(now - s.moved_at >= STORAGE_PATIENCE_S for s in seen.values()) else []
    return behind if len(behind) < len(seen) else []


class HangDetector(Callback):
    """This rank's pulse and its view of the others. `on_phase` is called by the training thread, and costs nothing.

    ``on_hang(culprits)`` is called once, from the monitor's thread, on the rank that is to act.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        host: str,
        store: PulseStore,
        on_hang: Callable[[list[Pulse]], None],
        clock: Callable[[], float] = time.monotonic,
        least_patience_s: float = LEAST_PATIENCE_S,
    ) -> None:
        self._least_patience_s = least_patience_s
        self._rank, self._size, self._host, self._store = rank, size, host, store
        self._on_hang, self._clock = on_hang, clock
        self._now = (0, "starting", 0)
        self._beat = 0
        self._seen: dict[int, Seen] = {}
        self._steps: deque[float] = deque(maxlen=RECENT_STEPS)
        self._main = threading.get_ident()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="heartbeat", daemon=True)

    def on_phase(self, step: int, phase: str) -> None:
        self._now = (step, phase, self._now[2] + 1)

    def on_step_end(self, metrics: Mapping[str, Any], batches: Sequence[Batch]) -> None:
        self._steps.append(metrics["step_s"])

    def place(self) -> str:
        """Returns the step and phase of this rank."""
        step, phase, _ = self._now
        return f"step {step}, {phase}"

    def __enter__(self) -> HangDetector:
        self.beat()  # from here on everybody knows of this rank, also if it stops before its thread has run
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()

    def still_s(self) -> float:
        """Seconds since any rank moved, as seen from here."""
        return self._clock() - max((s.moved_at for s in self._seen.values()), default=self._clock())

    def seen(self) -> dict[int, str]:
        """Where each rank was by the newest pulse that was read of it."""
        return {rank: seen.pulse.place for rank, seen in dict(self._seen).items()}

    def _work(self) -> None:
        while not self._closed.wait(BEAT_S):
            patience = patience_s(self._steps, self._least_patience_s)
            try:
                limited(lambda _: self._exchange(), STALE_S)  # a store's own time-out is not about every operation
                found = culprits(self._seen, self._clock(), patience)
            except (RuntimeError, NoAnswer):  # nobody's pulse can be seen, but for one's own
                found = self._keeper_of_the_store(patience)
            if found and self._rank == self._first_sound(found):
                self._on_hang(found)
                return

    def _exchange(self) -> None:
        self.beat()
        self.look()

    def beat(self) -> None:
        """Writes this rank's pulse."""
        step, phase, moves = self._now
        self._beat += 1
        pulse = Pulse(self._rank, self._host, os.getpid(), step, phase, moves, self._beat, self._stack())
        self._seen[self._rank] = _after(self._seen.get(self._rank), pulse, self._clock())
        self._store.set(_key(self._rank), json.dumps(asdict(pulse)))

    def _keeper_of_the_store(self, patience: float) -> list[Pulse]:
        """Rank 0 as it was seen last, once this rank has not moved for the patience either; on rank 0 itself nobody."""
        keeper, still = self._seen.get(0), self._clock() - self._seen[self._rank].moved_at >= patience
        return [keeper.pulse] if keeper is not None and self._rank and still else []

    def look(self) -> None:
        """Reads everybody's newest pulse."""
        now = self._clock()
        for rank in range(self._size):
            if self._store.check([_key(rank)]):
                pulse = Pulse(**json.loads(self._store.get(_key(rank))))
                self._seen[rank] = _after(self._seen.get(rank), pulse, now)

    def _first_sound(self, found: list[Pulse]) -> int:
        """Rank 0 where none is."""
        sick = {p.rank for p in found}
        return min((r for r in range(self._size) if r not in sick), default=0)

    def _stack(self) -> str:
        frame = _frames().get(self._main)
        return "".join(traceback.format_stack(frame)[-STACK_FRAMES:]) if frame else ""


def _frames() -> dict[int, FrameType]:
    """Of every thread. Without the collector: CPython 3.11 holds a lock of its own meanwhile, and a collection may call
    back into Python, which then waits for that lock for ever (python/cpython#106883)."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        return sys._current_frames()
    finally:
        if collecting:
            gc.enable()


def _after(before: Seen | None, pulse: Pulse, now: float) -> Seen:
    if before is None:
        return Seen(pulse, now, now)
    beat_at = before.beat_at if before.pulse.beat == pulse.beat else now
    moved_at = before.moved_at if before.pulse.moves == pulse.moves else now
    return Seen(pulse, beat_at, moved_at)


def _key(rank: int) -> str:
    return f"muster/pulse/{rank}"


def hang_text(found: Sequence[Pulse], silent_s: float) -> str:
    return f"nothing has moved for {silent_s:.0f} s; held up by " + "; ".join(map(str, found))


def end_culprits(found: Sequence[Pulse], host: str) -> None:
    """SIGKILL to those on this host (it reaches stopped processes too); where all are elsewhere, to this process."""
    here = [p.pid for p in found if p.host == host]
    for pid in here or [os.getpid()]:
        os.kill(pid, signal.SIGKILL)


def store_of_group() -> Any:
    """The default process group's store, by a connection of its own, so that it never waits behind others' calls."""
    from datetime import timedelta

    from torch.distributed.distributed_c10d import _get_default_store

    group_store: Any = _get_default_store()
    store = group_store.clone()
    store.set_timeout(timedelta(seconds=STALE_S))
    return store
