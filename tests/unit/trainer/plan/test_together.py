"""The memory of runs that share a base model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tests.support.planning import EIGHT_LAYERS, plan_recipe, planned
from trainer.plan.result import Limits
from trainer.plan.together import added_bytes, most_together, together_bytes


def test_each_further_run_adds_its_adapter_and_its_rows(tmp_path: Path) -> None:
    small = planned(plan_recipe(tmp_path, EIGHT_LAYERS, **{"adapter.rank": 4}), 2)
    large = planned(plan_recipe(tmp_path, EIGHT_LAYERS, **{"adapter.rank": 64, "training.micro_batch": 3}), 2)
    assert added_bytes(small.largest) < added_bytes(large.largest)
    assert together_bytes([small]) == small.peak_device_bytes
    assert together_bytes([small, large, large]) == small.peak_device_bytes + 2 * added_bytes(large.largest)
    assert together_bytes([small, small]) < 2 * small.peak_device_bytes


def test_the_most_that_fit_fit_and_one_more_does_not(tmp_path: Path) -> None:
    found = planned(plan_recipe(tmp_path, EIGHT_LAYERS))
    assert most_together(found) is None
    for room in (0, 1, 5):
        limit = found.device_reserve_bytes + found.peak_device_bytes + room * added_bytes(found.largest)
        assert most_together(replace(found, limits=Limits(limit))) == 1 + room
        assert together_bytes([found] * (1 + room)) + found.device_reserve_bytes <= limit
        assert together_bytes([found] * (2 + room)) + found.device_reserve_bytes > limit
    assert most_together(replace(found, limits=Limits(found.peak_device_bytes))) == 0
