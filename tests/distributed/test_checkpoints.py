"""Checkpoints as a real run makes them: the order of what it asks of its storage, and what it says of them."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import pytest

from tests.support.backing import watch
from tests.support.training import run_of, small_recipe, train_here, write_pairs
from trainer.recipe import Recipe
from trainer.run import layout
from trainer.run.jsonl import read_rows

CHANGES = {"training": {"steps": 4, "global_batch": 2, "micro_batch": 2}, "data.ledger": False}


@pytest.fixture
def recipe(tiny_model: Path, tmp_path: Path) -> Recipe:
    write_pairs(tmp_path / "data" / "a.jsonl", 20)
    checkpoint = {"every_steps": 2, "keep_last": 1}
    return small_recipe("a-run", tiny_model, tmp_path, **CHANGES, checkpoint=checkpoint)


PROTOCOL = {
    ("list", "claims"): "list claims",
    ("put", r"claims/d\d+"): "claim driver",
    ("put", r"claims/\d+"): "claim attempt",
    ("list", "commits"): "list commits",
    ("put", r"checkpoints/.*"): "upload",
    ("put", r"commits/.*"): "commit",
    ("delete", r"commits/.*"): "delete record",
    ("delete", r"checkpoints/.*"): "delete files",
}


def test_a_run_asks_its_storage_in_the_order_of_the_protocol(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model of tests/unit/trainer/checkpoint/protocol_model.py composes the same functions in the same order: this
    binds it."""
    backend, asked = watch(monkeypatch, Path(recipe.storage)), list[str]()

    def note(verb: str, path: str) -> None:
        key = path.removeprefix(f"{recipe.storage}/a-run/")
        names = [name for (v, pattern), name in PROTOCOL.items() if v == verb and re.fullmatch(pattern, key)]
        if threading.current_thread().name != "lease" and names and asked[-1:] != names:
            asked.extend(names)

    backend.before = note
    assert train_here(recipe) == "succeeded"
    assert asked[asked.index("claim attempt") - 1 : asked.index("delete files") + 1] == [
        "list claims", "claim attempt", "list claims", "list commits",
        "upload", "commit", "list claims", "list commits",
        "upload", "commit", "list claims", "list commits", "delete record", "delete files",
    ]  # fmt: skip


def test_metrics_and_events_say_what_checkpoints_cost(recipe: Recipe) -> None:
    train_here(recipe)
    rows = [row for row in read_rows(run_of(recipe), layout.METRICS) if "loss" in row]
    assert [row["stall_s"] > 0 for row in rows] == [False, False, True, False]
    assert all(row["backlog"] in (0, 1, 2) and 0 <= row["checkpoint_age_s"] < 300 for row in rows)
    events = [e for e in read_rows(run_of(recipe), layout.EVENTS) if e["event"] == "checkpoint"]
    assert [e["step"] for e in events] == [2, 4]
    for event in events:
        assert 0 < event["snapshot_s"] <= event["stall_s"]
        assert event["upload_s"] > 0
        assert event["bytes"] > 0
        assert event["coalesced"] == 0


def test_a_run_whose_commits_fall_behind_says_so_once_per_commit(recipe: Recipe) -> None:
    checkpoint = {"every_steps": 4, "keep_last": 1, "max_age_s": 1e-6}
    late = recipe.model_copy(update={"checkpoint": type(recipe.checkpoint)(**checkpoint)})
    train_here(late)
    said = [e for e in read_rows(run_of(late), layout.EVENTS) if e["event"] == "stale_checkpoint"]
    assert [e["step"] for e in said] == [1]
    assert said[0]["age_s"] > 0
