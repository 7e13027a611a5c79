"""Who holds the others up, decided from pulses alone."""

from __future__ import annotations

import dataclasses
import gc
import sys
import threading
from queue import SimpleQueue
from typing import Any

import pytest
import torch

from tests.support.waiting import wait_for
from trainer.distributed.world import World
from trainer.run.events import Pulse
from trainer.run.metrics import StepMetrics
from trainer.worker import hang_detector
from trainer.worker.hang_detector import (
    CHECKPOINT,
    FIRST_PATIENCE_S,
    STALE_S,
    STORAGE_PATIENCE_S,
    WAITING_FOR_DATA,
    WATCHERS,
    HangDetector,
    Seen,
    culprits,
    hang_text,
    look_interval_s,
    patience_s,
)

NOW, PATIENCE = 1000.0, 30.0
CPU = torch.device("cpu")


def seen(rank: int, moves: int, *, beat_ago: float = 0.5, moved_ago: float = 40.0, phase: str = "forward") -> Seen:
    pulse = Pulse(rank=rank, host=f"host{rank}", pid=100 + rank, step=7, phase=phase, moves=moves, beat=3)
    return Seen(pulse, NOW - beat_ago, NOW - moved_ago)


def names(*pulses: Seen) -> list[int]:
    return [p.rank for p in culprits({s.pulse.rank: s for s in pulses}, NOW, PATIENCE)]


def test_nobody_while_anybody_moves() -> None:
    assert names(seen(0, 5), seen(1, 5, moved_ago=29.0), seen(2, 4, beat_ago=60)) == []


def test_a_stopped_process_is_the_one_without_a_pulse() -> None:
    assert names(seen(0, 5), seen(1, 5, beat_ago=STALE_S + 1), seen(2, 5)) == [1]


def test_otherwise_those_that_came_least_far() -> None:
    assert names(seen(0, 9), seen(1, 9), seen(2, 8)) == [2]


def test_all_equally_far_names_nobody() -> None:
    assert names(seen(0, 9), seen(1, 9)) == []


def test_waiting_for_storage_is_no_hang_for_half_an_hour_but_a_stopped_process_is() -> None:
    assert names(seen(0, 9), seen(1, 8, phase=WAITING_FOR_DATA)) == []
    assert names(seen(0, 9), seen(1, 8, phase=WAITING_FOR_DATA, beat_ago=60)) == [1]
    long = STORAGE_PATIENCE_S + 1
    assert names(seen(0, 9, moved_ago=long), seen(1, 8, moved_ago=long, phase=CHECKPOINT)) == [1]


def test_a_storage_that_holds_every_rank_up_is_reported_by_rank_0() -> None:
    waiting = {"moved_ago": STORAGE_PATIENCE_S + 1, "phase": WAITING_FOR_DATA}
    assert names(seen(0, 9, **waiting), seen(1, 9, **waiting)) == [0, 1]  # type: ignore[arg-type]
    alone = HangDetector(World(0, 1, 0, CPU), DictStore(), lambda found: None)
    assert alone._first_sound([seen(0, 9).pulse]) == 0


@pytest.mark.parametrize(
    ("steps", "want"), [([], FIRST_PATIENCE_S), ([0.1] * 50, 30.0), ([1.0] * 99 + [20.0], 100.0), ([8.0], 40.0)]
)
def test_patience(steps: list[float], want: float) -> None:
    assert patience_s(steps) == want


class Rank(World):
    """A rank on a host of its own. It gathers its own value once per rank, with that rank's numbers."""

    @property
    def host(self) -> str:
        return f"host{self.rank}"

    def all_gather(self, value: Any) -> list[Any]:
        return [dataclasses.replace(value, rank=rank, pid=100 + rank) for rank in range(self.size)]


class DictStore(dict[str, str]):
    def set(self, key: str, value: str) -> None:
        self[key] = value

    def check(self, keys: list[str]) -> bool:
        return all(k in self for k in keys)

    def get(self, key: str) -> bytes:  # type: ignore[override]
        return self[key].encode()

    def multi_get(self, keys: list[str]) -> list[bytes]:
        assert self.check(keys), "it would wait for a key that is missing"
        self.looks = getattr(self, "looks", 0) + 1
        return [self.get(key) for key in keys]


def test_pulses_travel_through_the_store_with_step_phase_and_stack() -> None:
    store, clock = DictStore(), iter(range(100))
    found: list[Pulse] = []
    beats = [HangDetector(Rank(r, 2, r, CPU), store, found.extend, clock=lambda: float(next(clock))) for r in range(2)]
    beats[1].on_phase(12, "backward of micro-batch 3")
    for beat in beats:
        beat.beat()
    beats[0].look()
    pulse = beats[0]._seen[1].pulse
    assert (pulse.rank, pulse.host, pulse.step, pulse.phase, pulse.moves) == (
        1,
        "host1",
        12,
        "backward of micro-batch 3",
        1,
    )
    assert "test_pulses_travel_through_the_store" in pulse.stack
    assert beats[0].seen() == {0: "step 0, starting", 1: "step 12, backward of micro-batch 3"}
    assert "rank 1 on host1" in hang_text([pulse], 31.0)
    assert "step 12, backward of micro-batch 3" in hang_text([pulse], 31.0)


def test_rank_0_is_named_although_its_store_has_never_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may stop before another rank has read its first pulse."""
    monkeypatch.setattr(hang_detector, "BEAT_S", 0.01)
    monkeypatch.setattr(hang_detector, "STALE_S", 0.02)
    ended: SimpleQueue[list[Pulse]] = SimpleQueue()
    asked, never = threading.Event(), threading.Event()

    class Silent(DictStore):
        def set(self, key: str, value: str) -> None:
            asked.set()
            never.wait()

    try:
        with HangDetector(Rank(1, 2, 1, CPU), Silent(), ended.put, least_patience_s=0.05) as detector:
            detector.on_step_end(StepMetrics.from_row({"step": 1, "step_s": 0.001}), [])
            (pulse,) = ended.get(timeout=60)
    finally:
        never.set()
    assert asked.is_set()
    assert (pulse.rank, pulse.pid, pulse.place) == (0, 100, "step 0, starting")


@pytest.mark.parametrize("collecting", [True, False])
def test_no_collection_comes_while_a_stack_is_taken(collecting, monkeypatch):
    """In Python 3.11 it may end in a deadlock."""
    seen = []

    def frames():
        seen.append(gc.isenabled())
        raise RuntimeError("no frames")

    monkeypatch.setattr(sys, "_current_frames", frames)
    was = gc.isenabled()
    (gc.enable if collecting else gc.disable)()
    try:
        with pytest.raises(RuntimeError, match="no frames"):
            hang_detector._frames()
        assert gc.isenabled() is collecting
    finally:
        (gc.enable if was else gc.disable)()
    assert seen == [False]


def test_a_look_reads_the_pulses_of_all_ranks_at_once_or_of_those_that_there_are() -> None:
    store = DictStore()
    ranks = [HangDetector(Rank(r, 3, r, CPU), store, lambda found: None) for r in range(3)]
    for rank in ranks[:2]:
        rank.beat()
    ranks[0].look()
    assert set(ranks[0].seen()) == {0, 1}
    ranks[2].beat()
    ranks[0].look()
    assert set(ranks[0].seen()) == {0, 1, 2}
    assert store.looks == 1


@pytest.mark.parametrize("ranks", [2, 8, 64, 1024])
def test_the_looks_of_all_ranks_do_not_grow_with_their_square(ranks: int) -> None:
    every_s = [max(hang_detector.BEAT_S, look_interval_s(rank, ranks)) for rank in range(ranks)]
    assert sum(ranks / s for s in every_s) <= 2 * hang_detector.PULSES_S
    assert all(s == hang_detector.BEAT_S for s in (every_s if ranks <= 64 else every_s[:WATCHERS]))


def test_a_rank_that_looks_seldom_does_not_take_the_others_for_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its looks it knows nothing of them; at the next one it finds the rank that has really stopped."""
    monkeypatch.setattr(hang_detector, "BEAT_S", 0.001)
    now = [0.0]
    found: SimpleQueue[list[Pulse]] = SimpleQueue()
    store, ranks = DictStore(), WATCHERS + 1
    others = [HangDetector(Rank(r, ranks, r, CPU), store, lambda found: None) for r in range(WATCHERS)]

    class Beating(DictStore):
        """All of the others beat until the clock shows 100 s, and nobody moves."""

        def multi_get(self, keys: list[str]) -> list[bytes]:
            if now[0] < 100:
                for other in others:
                    other.beat()
            self.update(store)
            return super().multi_get(keys)

    mine = Beating()
    for other in others:
        other.beat()
    mine.update(store)
    last = HangDetector(Rank(WATCHERS, ranks, WATCHERS, CPU), mine, found.put, clock=lambda: now[0])
    last.on_step_end(StepMetrics.from_row({"step": 1, "step_s": 0.001}), [])
    monkeypatch.setattr(hang_detector, "look_interval_s", lambda rank, ranks: 60.0)
    with last:
        for now[0] in (20.0, 40.0, 60.0, 80.0, 99.0):
            wait_for(lambda beat=last._beat: last._beat > beat + 5, "some beats")
            assert found.empty()
        now[0] = 240.0
        wait_for(lambda: not found.empty() or mine.looks > 2, "a look")
        now[0] = 300.0
        assert {pulse.rank for pulse in found.get(timeout=60)} == set(range(WATCHERS))
