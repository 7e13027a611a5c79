"""Stopping rules: decisions are recorded, and a sweep that is resumed decides as if it had not been interrupted."""

from __future__ import annotations

import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.raytrain.stopping import Decides
from trainer.recipe.sections.sweep import SweepSection
from trainer.recipe.sweeps.searches import STOPS

GRACE = 5


class PlayedTrial:
    def __init__(self, number: int) -> None:
        self.trial_id, self.config, self.status = str(number), {"number": number}, "RUNNING"


class Played:
    """A scheduler that gets results of trials by their numbers."""

    def __init__(self, stop: str, mode: str = "min") -> None:
        self.stopped: dict[int, int] = {}
        self._scheduler: Decides = STOPS.load(stop)(SweepSection(stop=stop), mode, GRACE)
        self._scheduler.stop = self.stopped.__setitem__
        self._trials: dict[int, Any] = {}

    def result(self, number: int, step: int, value: float, *, replayed: bool = False) -> None:
        if number not in self._trials:
            self._trials[number] = PlayedTrial(number)
            self._scheduler.on_trial_add(None, self._trials[number])
        result = {"step": step, "value": value, "replayed": replayed}
        controller = SimpleNamespace(get_live_trials=lambda: [SimpleNamespace(status="PENDING")])
        assert self._scheduler.on_trial_result(controller, self._trials[number], result) == "CONTINUE"

    def end(self, number: int, last: dict[str, Any]) -> None:
        self._scheduler.on_trial_complete(None, self._trials[number], last)


@pytest.mark.parametrize("stop", STOPS.names())
def test_the_worst_trial_is_stopped_and_the_best_is_not(stop: str) -> None:
    for mode, sign in (("min", 1), ("max", -1)):
        played = Played(stop, mode)
        for number in range(1, 6):
            played.result(number, 5, sign * (1.0 + 0.1 * number), replayed=True)
        played.result(6, 5, sign * 9.0)
        played.result(7, 5, sign * 0.5)
        assert (6 in played.stopped) == (stop != "none")
        assert 7 not in played.stopped


def test_the_first_steps_are_left_to_every_trial() -> None:
    for stop in STOPS.names():
        played = Played(stop)
        for number in range(1, 8):
            played.result(number, 4, float(number))
        assert not played.stopped


def results(generator: random.Random) -> list[tuple[int, int, float]]:
    quality = {number: generator.uniform(1, 5) for number in range(1, 13)}
    found = [(number, step, quality[number] - 0.01 * step) for number in quality for step in range(5, 50, 5)]
    generator.shuffle(found)
    return sorted(found, key=lambda one: one[1] + 10 * (one[0] // 2))  # two at a time


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("cut", [10, 40, 80])
def test_replayed_in_any_order_asha_decides_the_same(seed: int, cut: int) -> None:
    generator = random.Random(seed)
    rows = results(generator)
    whole = played_through(Played("asha"), rows)
    begun = played_through(Played("asha"), rows[:cut])
    resumed = Played("asha")
    known = [row for row in rows[:cut] if row[1] <= begun.get(row[0], 10**9)]
    generator.shuffle(known)
    for number, step, value in sorted(known, key=lambda row: row[1]):
        resumed.result(number, step, value, replayed=True)
    assert resumed.stopped == {}  # what was decided is in the records
    resumed.stopped.update(begun)
    assert played_through(resumed, rows[cut:]) == whole


def played_through(played: Played, rows: Sequence[tuple[int, int, float]]) -> dict[int, int]:
    for number, step, value in rows:
        if number not in played.stopped:
            played.result(number, step, value)
    return played.stopped


def test_a_trial_that_failed_is_left_out() -> None:
    for stop in STOPS.names():
        played = Played(stop)
        for number in range(1, 5):
            played.result(number, 5, 1.0)
            played.end(number, {"done": True})
        played.result(9, 5, 0.5)
        assert 9 not in played.stopped


def test_the_median_takes_replayed_results_of_a_trial_that_was_stopped() -> None:
    played = Played("median")
    for number in range(1, 5):
        played.result(number, 5, 1.0, replayed=True)
    for step in (5, 10, 15):
        played.result(5, step, 9.0, replayed=True)
    played.result(6, 5, 9.0)
    assert played.stopped == {6: 5}
