"""What can be known only once Ray is there, and still ends before any worker starts."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from tests.support.jobs import Command, muster_run
from tests.support.training import run_of, small_recipe, write_pairs
from trainer.recipe import Recipe
from trainer.run import layout

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


def assert_refused(command: Command, recipe: Recipe, *said: str) -> None:
    assert command.wait() == 2, command.output()
    output = command.output()
    last = output.strip().splitlines()[-1]
    for part in said:
        assert part in last
    assert "Traceback" not in output
    assert "raylet" not in output
    assert "starting workers" not in output
    # Nothing was frozen: the mended recipe may be another one.
    assert run_of(recipe).info(layout.RECIPE) is None


@pytest.mark.night
def test_a_joined_cluster_without_room_says_what_is_missing(joined: str, tiny_model: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path / "data" / "a.jsonl", 20)
    recipe = small_recipe("too-many", tiny_model, tmp_path, **{"resources.workers": 6})
    began = time.monotonic()
    command = muster_run(recipe, tmp_path)
    assert_refused(command, recipe, "asks for 6 workers with 1 CPU each", "has room for 4", "missing: 2 CPUs")
    told = re.search(r"\[ *([\d.]+) s\] joining Ray", command.output())
    assert told is not None
    assert time.monotonic() - began - float(told[1]) < 60


@pytest.mark.night
def test_a_broken_line_deep_in_the_data_is_named(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    path = tmp_path / "data" / "a.jsonl"
    write_pairs(path, 60)
    lines = path.read_text().splitlines()
    lines[41] = lines[41][:-10]
    path.write_text("\n".join(lines))
    recipe = small_recipe("broken", tiny_model, tmp_path)
    assert_refused(muster_run(recipe, tmp_path), recipe, f"{path}, line 42: not valid JSON")
