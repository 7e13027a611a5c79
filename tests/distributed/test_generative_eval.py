"""Generated answers on several ranks: the texts and scores of one rank, and a failing metric that ends all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import run_ranks
from tests.support.rewards import CALLS, calls
from tests.support.tasks import task_recipe, write_task_data
from tests.support.training import adapter_bytes, losses, run_of, train_here, train_rank
from trainer.errors import RewardFailed
from trainer.recipe import Recipe
from trainer.run import layout
from trainer.run.jsonl import read_rows

COUNT = 5


def recipe_of(name: str, model: Path, folder: Path, **changes: Any) -> Recipe:
    asked = {"count": COUNT, "max_new_tokens": 8, "metric": "tests.support.rewards:length"}
    few = {"training.steps": 3, "training.eval_every": 2, "data.sequence_length": 96, "training.micro_batch": 1}
    return task_recipe("sft", name, model, folder, **{**few, "generative_eval": asked, **changes})


def train_all(rank: int, recipes: list[Recipe], failing: Recipe) -> None:
    train_rank(rank, recipes)
    with pytest.raises(RewardFailed, match="raising raised KeyError: 'judge'"):
        train_rank(rank, [failing])


def answers(recipe: Recipe) -> list[Any]:
    """The score of each evaluation and the texts that are shown of it; five questions are five batches here."""
    rows = [row for row in read_rows(run_of(recipe), layout.METRICS) if "loss" not in row]
    events = [event for event in read_rows(run_of(recipe), layout.EVENTS) if event.get("when") == "evaluation"]
    texts = [[(text["sample"], text["text"], text["score"]) for text in event["texts"]] for event in events]
    return [[(row["step"], row["eval_answers"], row["eval_score"]) for row in rows], texts]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("kinds", [["fsdp"], pytest.param(["ddp", "zero2", "zero3"], marks=pytest.mark.night)], ids=str)
def test_several_ranks_answer_like_one_and_fail_together(
    kinds: list[str], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CALLS, str(tmp_path / "calls.jsonl"))
    write_task_data(tmp_path, "sft")
    one = recipe_of("one", tiny_model, tmp_path)
    several = [recipe_of(kind, tiny_model, tmp_path, **{"strategy.kind": kind}) for kind in kinds]
    without = recipe_of("without", tiny_model, tmp_path, **{"strategy.kind": kinds[0], "generative_eval": {}})
    failing = recipe_of("failing", tiny_model, tmp_path, **{"generative_eval.metric": "tests.support.rewards:raising"})
    assert train_here(one) == "succeeded"
    run_ranks(train_all, 2, [*several, without], failing)
    assert {len(call["completions"]) for call in calls()} == {COUNT}, "all answers of all ranks"
    rows, texts = answers(one)
    assert [row[:2] for row in rows] == [(2, COUNT), (3, COUNT)]
    assert [len(shown) for shown in texts] == [4, 4]
    assert [answers(recipe) for recipe in several] == [[rows, texts]] * len(several)
    assert (adapter_bytes(several[0]), losses(several[0])) == (adapter_bytes(without), losses(without))
