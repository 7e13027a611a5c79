"""Where starting goes: phases that add up, and workers that stand by."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.training import run_of, small_recipe, train_here, write_pairs
from trainer.run import layout
from trainer.run.jsonl import read_rows
from trainer.run.startup_phases import DATA, IMPORT, PHASES, Phases, process_began
from trainer.worker.job import Job

ROOT = Path(__file__).resolve().parents[4]


class Clock:
    def __init__(self) -> None:
        self.now = 10.0

    def __call__(self) -> float:
        return self.now


def job(folder: Path) -> Job:
    recipe = small_recipe("a-run", folder / "model", folder)
    return Job(recipe.storage, 1, recipe, 10, {})


def test_phases_add_up_to_the_whole_over_two_processes() -> None:
    clock, theirs = Clock(), Clock()
    driver = Phases(4.0, clock=clock)
    driver.end(IMPORT)
    clock.now += 2.5
    driver.end(DATA)
    theirs.now = 9000.0
    rank = Phases(9000.0, driver.spent(), clock=theirs)
    theirs.now += 1.25
    rank.end(DATA)
    assert list(rank.spent()) == list(PHASES)
    assert rank.spent()[IMPORT] == 6.0
    assert rank.spent()[DATA] == 3.75
    assert sum(rank.spent().values()) == 6.0 + 2.5 + 1.25


def test_a_process_knows_when_it_was_started() -> None:
    imports = "import time; from trainer.run.startup_phases import process_began"
    code = f"{imports}; time.sleep(0.3); print(time.monotonic() - process_began())"
    began = time.monotonic()
    told = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 0.3 <= told <= time.monotonic() - began + 0.02


def test_the_start_is_now_where_the_system_does_not_tell(tmp_path: Path) -> None:
    assert abs(process_began(tmp_path / "none") - time.monotonic()) < 1.0


def test_an_attempt_tells_what_its_start_took(tiny_model: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path / "data" / "rows.jsonl", 24)
    recipe = small_recipe("started", tiny_model, tmp_path)
    assert train_here(recipe) == "succeeded"
    events = read_rows(run_of(recipe), layout.EVENTS)
    (told,) = [event for event in events if event["event"] == "startup"]
    assert told["step"] == 1
    assert list(told["seconds"]) == list(PHASES)
    assert told["total_s"] == pytest.approx(sum(told["seconds"].values()))
    assert told["seconds"]["model"] > 0
    assert told["seconds"]["first_step"] > 0


def test_ray_is_told_before_it_is_imported_that_nothing_joins_a_cluster_by_itself() -> None:
    """It looks at some settings only then; what is still running when the driver leaves would join another Ray here."""
    code = """
from launcher.raytrain import session
session.set_up(None)
import ray
assert not ray.is_initialized()
from ray._private.auto_init_hook import enable_auto_connect
assert not enable_auto_connect
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
