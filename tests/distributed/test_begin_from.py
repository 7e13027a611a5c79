"""A run on several ranks that begins from a trained adapter, keeps its best checkpoint and ends early, does what one
process does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.saved import trained
from tests.support.training import losses, run_of, small_recipe, train_here, train_in_processes, write_pairs
from trainer.checkpoint import list_commits
from trainer.checkpoint.publish import finished
from trainer.recipe import Recipe
from trainer.run.events import EarlyStopEvent, StartEvent
from trainer.run.jsonl import read_events

BY_DAY, BY_NIGHT = ("fsdp",), ("zero3",)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", [*BY_DAY, *(pytest.param(kind, marks=pytest.mark.night) for kind in BY_NIGHT)])
def test_ranks_begin_and_end_like_one_process(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path / "data" / "a.jsonl", 24)
    write_pairs(tmp_path / "eval" / "a.jsonl", 4)
    source = trained("source", tiny_model, tmp_path)
    changes: dict[str, Any] = {
        "adapter.from": run_of(source).url,
        "adapter.dropout": 0.0,
        "data.eval": [{"path": f"{tmp_path}/eval/*.jsonl", "format": "completion"}],
        "training.steps": 9,
        "training.eval_every": 1,
        # An improvement that no evaluation makes: the first one stays the best, and the third one ends the run.
        "training.early_stop": {"metric": "eval_loss", "patience": 2, "min_delta": 100.0},
        "checkpoint.keep_best": "eval_loss",
        "checkpoint.keep_last": 1,
    }
    one = small_recipe("one", tiny_model, tmp_path, **changes)
    two = small_recipe("two", tiny_model, tmp_path, **changes, **{"strategy.kind": kind})
    assert train_here(one) == "succeeded"
    train_in_processes([two], 2)
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    assert losses(two).keys() == {1, 2, 3}
    assert losses(two)[1] < losses(source)[1] - 0.02, "it has begun with what the other has learnt"
    assert [ends_of(recipe) for recipe in (one, two)] == [(3, 3, 2)] * 2
    (start,) = (event for event in read_events(run_of(two)) if isinstance(event, StartEvent))
    assert start.begins_from == list_commits(run_of(one))[0].state["begins_from"]
    infos = [json.loads(run_of(recipe).read("adapter/muster.json"))["best"] for recipe in (one, two)]
    assert infos[0]["step"] == infos[1]["step"]
    assert infos[1]["value"] == pytest.approx(infos[0]["value"], abs=1e-5)


def ends_of(recipe: Recipe) -> tuple[int, int | None, int | None]:
    """Returns the step of the last commit, and the step and the evaluations of the early end."""
    last = finished(run_of(recipe), recipe.training)
    assert last is not None
    (early,) = (event for event in read_events(run_of(recipe)) if isinstance(event, EarlyStopEvent))
    return last.step, early.step, early.evaluations
