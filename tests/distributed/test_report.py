"""What the report reads off a real run: the data that it was given, and which of its ranks was slow."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from launcher.report import report
from launcher.report.flow import straggler
from launcher.report.reading import read_run
from tests.support.ranks import run_ranks
from tests.support.training import run_of, small_recipe, train_rank, write_pairs
from trainer.recipe import Recipe

SLOWER_S = 0.3


def train_slowed(rank: int, recipe: Recipe) -> None:
    """Rank 1 takes longer over each micro-batch."""
    from trainer import loop

    seed = loop.seed_micro_batch

    def slowed(*args: Any) -> None:
        time.sleep(SLOWER_S * rank)
        seed(*args)

    loop.seed_micro_batch = slowed
    train_rank(rank, [recipe])


def test_it_tells_the_data_the_seconds_and_the_slow_rank(tiny_model: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path / "data" / "a.jsonl", 20)
    changes = {"training": {"steps": 4, "global_batch": 4, "micro_batch": 2}, "data.ledger": False}
    recipe = small_recipe("slow", tiny_model, tmp_path, **changes, checkpoint={"every_steps": 2})
    run_ranks(train_slowed, 2, recipe)
    run = read_run(run_of(recipe))
    told = straggler(run)
    assert told.startswith("slow, attempt 1: the slowest is rank 1 on ")
    for row in run.steps:
        fast, slow = row["rank_s"]
        assert slow >= SLOWER_S
        assert fast < row["step_s"]
        # In a step where the other rank warms up, it may be the slower one.
        slowest = 1 if slow > fast else 0
        assert (row["slowest_rank"], row["slowest_rank_s"]) == (slowest, pytest.approx(max(fast, slow), abs=1e-4))
    assert sum(run.went.seconds.values()) == pytest.approx(run.went.wall_s)
    assert run.went.seconds["training"] >= 4 * SLOWER_S
    assert run.data.summary is not None
    assert [(part, counts.rows) for part, _, counts in run.data.parts] == [("train", 20)]
    page = report([run])
    assert "data/*.jsonl" in page, "sources are named as the recipe names them"
