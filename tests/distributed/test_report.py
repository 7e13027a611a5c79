"""What the report reads off a real run that was killed, resized and resumed: the data that it was given, which of its
ranks was slow, and where its seconds went."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from torch.multiprocessing import ProcessExitedException

from launcher.report import report
from launcher.report.reading import RunRecord, read_run
from launcher.report.timeline_charts import straggler
from tests.support.browser import FOUND, browser
from tests.support.made_up_run import CHARTS, GROUPS
from tests.support.ranks import run_ranks
from tests.support.training import run_of, small_recipe, train_rank, write_pairs
from trainer.checkpoint import list_commits
from trainer.recipe import Recipe
from trainer.run import layout
from trainer.run.events import StartEvent
from trainer.run.jsonl import read_rows

SLOWER_S = 0.3
SAVED, DIES_AT, STEPS = 2, 4, 4


def train_slowed(rank: int, recipe: Recipe, dies_at: int | None) -> None:
    """Rank 1 takes longer over each micro-batch, and kills itself in the step ``dies_at``."""
    from trainer.worker import loop

    seed = loop.seed_micro_batch

    def slowed(seed_of_run: int, step: int, *which: int) -> None:
        time.sleep(SLOWER_S * rank)
        if rank == 1 and step == dies_at:
            await_stored(recipe, step - 1)
            os.kill(os.getpid(), signal.SIGKILL)
        seed(seed_of_run, step, *which)

    loop.seed_micro_batch = slowed
    train_rank(rank, [recipe])


def await_stored(recipe: Recipe, step: int) -> None:
    """The record of the step, and a commit."""
    run = run_of(recipe)
    deadline = time.monotonic() + 60
    while not (list_commits(run) and any(row["step"] == step for row in read_rows(run, layout.METRICS))):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def story(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, float]:
    """The run, and the seconds that both its attempts took with all around them."""
    folder = tmp_path_factory.mktemp("report")
    write_pairs(folder / "data" / "a.jsonl", 20)
    changes: dict[str, Any] = {"training": {"steps": STEPS, "global_batch": 4, "micro_batch": 2, "eval_every": 2}}
    changes |= {"data.ledger": False, "data.eval": [{"path": f"{folder}/data/*.jsonl", "format": "completion"}]}
    recipe = small_recipe("slow", tiny_model, folder, **changes, checkpoint={"every_steps": SAVED})
    began = time.monotonic()
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        run_ranks(train_slowed, 2, recipe, DIES_AT)
    run_ranks(train_slowed, 1, recipe, None)
    return recipe, time.monotonic() - began


@pytest.fixture(scope="module")
def run(story: tuple[Recipe, float]) -> RunRecord:
    return read_run(run_of(story[0]))


def test_it_tells_the_data_and_the_slow_rank(run: RunRecord) -> None:
    assert straggler(run).startswith("slow, attempt 1: the slowest is rank 1 on ")
    for row in (row for row in run.trained if row.attempt == 1):
        assert row.rank_s is not None
        assert row.step_s is not None
        assert row.memory_bytes is not None
        fast, slow = row.rank_s
        assert slow >= SLOWER_S
        assert fast < row.step_s
        # In a step where the other rank warms up, it may be the slower one.
        slowest = 1 if slow > fast else 0
        assert (row.slowest_rank, row.slowest_rank_s) == (slowest, pytest.approx(max(fast, slow), abs=1e-4))
        assert row.memory_bytes > 50 << 20
        assert row.memory_rank in (0, 1)
    assert run.data.summary is not None
    assert [(part, counts.rows) for part, _, counts in run.data.parts] == [("train", 20), ("eval", 20)]
    assert "data/*.jsonl" in report([run]), "sources are named as the recipe names them"


def test_it_tells_where_the_seconds_of_two_drivers_went(run: RunRecord, story: tuple[Recipe, float]) -> None:
    starts = run.told(StartEvent)
    assert [start.driver for start in starts] == [1, 2]
    assert [start.devices for start in starts] == [("cpu", "cpu"), ("cpu",)]
    assert all(start.versions["torch"] for start in starts)
    assert run.starts == {1: 0, 2: SAVED}
    assert [row.step for row in run.lost] == list(range(SAVED + 1, DIES_AT))
    spent, wall_s = run.went.seconds, run.went.wall_s
    assert sum(spent.values()) == pytest.approx(wall_s)
    assert wall_s <= story[1]
    assert spent["training"] >= SAVED * SLOWER_S
    assert spent["lost"] >= (DIES_AT - 1 - SAVED) * SLOWER_S
    assert min(spent["starting"], spent["waiting"], spent["evaluating"], spent["checkpoint"]) > 0


def test_its_page_has_every_section_and_adds_up_to_a_hundred(run: RunRecord, tmp_path: Path) -> None:
    page = report([run])
    assert re.findall(r'<section id="([\w-]+)"', page) == [group for group in GROUPS if group != "samples"]
    (figures,) = re.findall(r'<script type="application/json" id="figures">(.*?)</script>', page)
    charts = tuple(json.loads(figures))
    assert tuple(chart for chart in charts if chart != "metric-eval_perplexity") == CHARTS
    shares = [share for trace in json.loads(figures)["goodput"]["data"] for share in trace["x"]]
    assert sum(shares) == pytest.approx(100, abs=1)
    if FOUND is None:
        pytest.skip("no chromium: apt-get install chromium")
    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    with browser(tmp_path / "profile") as tab:
        tab.open(tmp_path / "report.html")
        assert tab.ask("document.documentElement.dataset.drawn") == str(len(charts))
        assert tab.said == []
