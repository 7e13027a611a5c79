"""Finds the rank that causes a hang: each rank publishes its progress, and the lowest healthy rank acts on a hang.

Each rank writes a *pulse* (step, phase, number of phases so far, the main thread's stack) to the process group's
store every ``BEAT_S`` seconds, from a thread of its own. If no rank has moved for the patience (five times the 99th
percentile of the step times so far, at least ``LEAST_PATIENCE_S``), the culprits are

- rank 0, if the store itself does not answer, because its process hosts the store; or else
- the ranks whose pulse stopped (a stopped process, a dead host); or else
- the ranks with the least progress: the others wait for them in a collective. Phases that wait for storage get half an
  hour: each call has a deadline of its own, but a phase may be many calls. So does a function that scores answers.

The lowest rank that is not a culprit reports the culprits and ends them (or itself, if they are on another host), so
that the launcher starts the group again from the newest checkpoint.

A look reads the pulse of every rank, from one store in one process. If every rank looked at every beat, the store's
work would grow with the square of the ranks. So only up to 64 ranks do that. Of more, the first ``WATCHERS`` share
``PULSES_S``, and the others, which are needed if all of those are culprits, share as many.
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
from trainer.distributed.world import World
from trainer.run.events import Pulse
from trainer.run.metrics import StepMetrics
from trainer.storage.backend import Moved, NoAnswer
from trainer.storage.limit import limited
from trainer.worker.callbacks import Callback

BEAT_S = 1.0
STALE_S = 10.0
LEAST_PATIENCE_S = 30.0
COMPILING_PATIENCE_S = 600.0
"""The least patience with compiled layers: a shape or mode that is new to a rank is compiled at any step."""
FIRST_PATIENCE_S = 1800.0
RECENT_STEPS = 200
STACK_FRAMES = 12
WATCHERS = 4
"""The ranks with the lowest numbers, which look most often."""
PULSES_S = 4096
"""Pulses that the watchers read per second, and that all others read."""
WAITING_FOR_DATA, CHECKPOINT, SCORING = "waiting for data", "checkpoint", "scoring of the answers"
PATIENT_PHASES = (WAITING_FOR_DATA, CHECKPOINT, SCORING)
"""Phases that wait for storage, or for a function of the recipe."""
STORAGE_PATIENCE_S = 1800.0


class PulseStore(Protocol):
    """The part of ``torch.distributed.Store`` that is used here, so that a test can replace it by a dictionary."""

    def set(self, key: str, value: str) -> None: ...
    def check(self, keys: list[str]) -> bool: ...
    def get(self, key: str) -> bytes: ...
    def multi_get(self, keys: list[str]) -> list[bytes]: ...


@dataclass(frozen=True)
class Seen:
    """A pulse, and the times on this rank's clock when its beat and its moves were last seen to change."""

    pulse: Pulse
    beat_at: float
    moved_at: float


def patience_s(step_times: Sequence[float], least_s: float = LEAST_PATIENCE_S) -> float:
    """Returns the seconds without progress that count as a hang: max(5 · p99 of the step times, ``least_s``), and half
    an hour until the first step is done."""
    if not step_times:
        return FIRST_PATIENCE_S
    ordered = sorted(step_times)
    return max(least_s, 5 * ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))])


def look_interval_s(rank: int, ranks: int) -> float:
    """Returns the seconds between two looks of this rank; fewer than ``BEAT_S`` for a look at every beat."""
    return (WATCHERS if rank < WATCHERS else ranks - WATCHERS) * ranks / PULSES_S


def culprits(seen: Mapping[int, Seen], now: float, patience: float) -> list[Pulse]:
    """Returns the ranks that stop the others. Empty while a rank moves, or if all have the same progress and still
    beat, unless all of them are in a phase that gets half an hour."""
    if not seen or any(now - s.moved_at < patience for s in seen.values()):
        return []
    silent = [s.pulse for s in seen.values() if now - s.beat_at >= STALE_S]
    if silent:
        return silent
    least = min(s.pulse.moves for s in seen.values())
    behind = [s.pulse for s in seen.values() if s.pulse.moves == least]
    if any(p.phase in PATIENT_PHASES for p in behind):
        return behind if all(now - s.moved_at >= STORAGE_PATIENCE_S for s in seen.values()) else []
    return behind if len(behind) < len(seen) else []


class HangDetector(Callback):
    """Publishes this rank's pulse and watches the others'.

    ``on_hang(culprits)`` is called once, in the monitor's thread, on the rank that must act. ``name``: of the run;
    several may be trained in the same processes.
    """

    def __init__(
        self,
        world: World,
        store: PulseStore,
        on_hang: Callable[[list[Pulse]], None],
        clock: Callable[[], float] = time.monotonic,
        least_patience_s: float = LEAST_PATIENCE_S,
        name: str = "run",
    ) -> None:
        self._least_patience_s = least_patience_s
        self._world, self._rank, self._store = world, world.rank, store
        self._on_hang, self._clock = on_hang, clock
        self._name, self._now = name, (0, "starting", 0)
        self._beat = 0
        self._seen: dict[int, Seen] = {}
        self._all_published = False
        self._steps: deque[float] = deque(maxlen=RECENT_STEPS)
        self._main = threading.get_ident()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="heartbeat", daemon=True)

    def on_phase(self, step: int, phase: str) -> None:
        self._now = (step, phase, self._now[2] + 1)

    def on_step_end(self, metrics: StepMetrics, batches: Sequence[Batch]) -> None:
        self._steps.append(metrics.step_s or 0.0)

    def place(self) -> str:
        """Returns the step and phase of this rank."""
        step, phase, _ = self._now
        return f"step {step}, {phase}"

    def __enter__(self) -> HangDetector:
        """Collective: every rank knows every other rank from now on, even if one stops before its thread has run, and
        rank 0 even if its store never answers."""
        now = self._clock()
        self._seen = {pulse.rank: Seen(pulse, now, now) for pulse in self._world.all_gather(self._pulse())}
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()

    def still_s(self) -> float:
        """Returns the seconds since this rank last saw any rank move."""
        return self._clock() - max((s.moved_at for s in self._seen.values()), default=self._clock())

    def seen(self) -> dict[int, str]:
        """Returns each rank's step and phase by the newest pulse that was read."""
        return {rank: seen.pulse.place for rank, seen in dict(self._seen).items()}

    def _work(self) -> None:
        interval_s = look_interval_s(self._rank, self._world.size)
        look_at = self._clock() + interval_s * self._rank / self._world.size  # the ranks take turns
        while not self._closed.wait(BEAT_S):
            patience = patience_s(self._steps, self._least_patience_s)
            if looks := self._clock() >= look_at:
                look_at = self._clock() + interval_s
            exchange = self._exchange if looks else self._beat_only
            try:
                limited(exchange, STALE_S)  # the store's own time-out does not cover every operation
                # Between two looks, the other ranks only seem to be silent.
                found = culprits(self._seen, self._clock(), patience) if looks else []
            except (RuntimeError, NoAnswer):
                # Only this rank's own pulse can be seen. If it is still too, rank 0 hangs, which keeps the store.
                still = self._clock() - self._seen[self._rank].moved_at >= patience
                found = [self._seen[0].pulse] if self._rank and still else []
            if found and self._rank == self._first_sound(found):
                self._on_hang(found)
                return

    def _exchange(self, moved: Moved) -> None:
        self.beat()
        self.look()

    def _beat_only(self, moved: Moved) -> None:
        self.beat()

    def beat(self) -> None:
        """Writes this rank's pulse."""
        pulse = self._pulse()
        self._seen[self._rank] = _after(self._seen.get(self._rank), pulse, self._clock())
        self._store.set(self._key(self._rank), json.dumps(asdict(pulse)))

    def _pulse(self) -> Pulse:
        (step, phase, moves), frame = self._now, _frames().get(self._main)
        self._beat += 1
        return Pulse(
            rank=self._rank,
            host=self._world.host,
            pid=os.getpid(),
            step=step,
            phase=phase,
            moves=moves,
            beat=self._beat,
            stack="".join(traceback.format_stack(frame)[-STACK_FRAMES:]) if frame else "",
        )

    def look(self) -> None:
        """Reads the newest pulse of every rank."""
        keys = [self._key(rank) for rank in range(self._world.size)]
        # One request for all; it would wait for a key that is missing, because its rank stopped before its first beat.
        self._all_published = self._all_published or self._store.check(keys)
        if self._all_published:
            stored = self._store.multi_get(keys)
        else:
            stored = [self._store.get(key) for key in keys if self._store.check([key])]
        now = self._clock()
        for pulse in (Pulse(**json.loads(one)) for one in stored):
            self._seen[pulse.rank] = _after(self._seen.get(pulse.rank), pulse, now)

    def _key(self, rank: int) -> str:
        return f"muster/pulse/{self._name}/{rank}"

    def _first_sound(self, found: list[Pulse]) -> int:
        """Returns the lowest rank that is not a culprit; rank 0 if all are."""
        sick = {p.rank for p in found}
        return min((r for r in range(self._world.size) if r not in sick), default=0)


def _frames() -> dict[int, FrameType]:
    """Returns the current frame of every thread."""
    # CPython 3.11 holds a lock during _current_frames; a garbage collection in it may call back into Python, which then
    # waits for that lock forever (python/cpython#106883).
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


def hang_text(found: Sequence[Pulse], silent_s: float) -> str:
    return f"nothing has moved for {silent_s:.0f} s; held up by " + "; ".join(map(str, found))


def end_culprits(found: Sequence[Pulse], host: str) -> None:
    """Sends SIGKILL (it also reaches stopped processes) to the culprits on this host, or to this process if there are
    none."""
    here = [p.pid for p in found if p.host == host]
    for pid in here or [os.getpid()]:
        os.kill(pid, signal.SIGKILL)


def store_of_group() -> Any:
    """Returns a second connection to the default process group's store, which never waits behind other calls."""
    from datetime import timedelta

    from torch.distributed.distributed_c10d import _get_default_store

    group_store: Any = _get_default_store()
    store = group_store.clone()
    store.set_timeout(timedelta(seconds=STALE_S))
    return store
