"""Texts of several turns on several ranks: the same texts and bytes as on one, and errors that end all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import run_ranks
from tests.support.tasks import task_recipe, write_task_data
from tests.support.training import adapter_bytes, run_of, train_in_processes, train_rank
from trainer.errors import RewardFailed
from trainer.recipe import Recipe
from trainer.run import layout
from trainer.run.jsonl import read_rows

COMPARED = ("loss", "reward", "turns", "response_tokens", "entropy", "grad_norm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grpo-turns")
    write_task_data(folder, "grpo")
    return folder


def recipe_of(name: str, model: Path, folder: Path, environment: str = "Asking", **more: Any) -> Recipe:
    settings = {
        "environment": f"tests.support.environments:{environment}",
        "reward": {},
        "stop": ["e", "a", "t", "o"],
        "max_text_tokens": 60,
    }
    changes = {"training.steps": 2, "training.eval_every": None, **{f"grpo.{k}": v for k, v in settings.items()}}
    return task_recipe("grpo", name, model, folder, **{**changes, **more})


def texts_of(recipe: Recipe) -> list[list[Any]]:
    events = [event for event in read_rows(run_of(recipe), layout.EVENTS) if event["event"] == "texts"]
    return [[(text["sample"], text["text"]) for text in event["texts"]] for event in events]


@pytest.mark.timeout(120)
def test_exact_holds_on_two_ranks(tiny_model: Path, folder: Path) -> None:
    recipes = [recipe_of(f"exact-{ranks}", tiny_model, folder, exact=True) for ranks in (1, 2)]
    for ranks, recipe in enumerate(recipes, 1):
        train_in_processes([recipe], ranks)
    assert adapter_bytes(recipes[0]) == adapter_bytes(recipes[1])
    assert texts_of(recipes[0]) == texts_of(recipes[1]) != []


@pytest.mark.night
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("kind", "ranks"), [("fsdp", 2), ("zero3", 2), ("fsdp", 3)])
def test_ranks_whose_forward_is_collective_take_part_in_all_rounds(
    tiny_model: Path, folder: Path, kind: str, ranks: int
) -> None:
    one = recipe_of(f"one-{kind}-{ranks}", tiny_model, folder)
    many = recipe_of(f"{kind}-{ranks}", tiny_model, folder, **{"strategy.kind": kind})
    train_in_processes([one], 1)
    train_in_processes([many], ranks)
    assert texts_of(many) == texts_of(one) != []
    rows = [[r for r in read_rows(run_of(recipe), layout.METRICS) if "turns" in r] for recipe in (one, many)]
    for want, got in zip(*rows, strict=True):
        for name in COMPARED:
            assert got[name] == pytest.approx(want[name], rel=1e-4, abs=1e-4), name


def expect_a_broken_environment(rank: int, recipe: Recipe) -> None:
    with pytest.raises(RewardFailed, match=r"step 1, rank 1: .*BrokenOnTheSecondRank\.step raised KeyError"):
        train_rank(rank, [recipe])


@pytest.mark.timeout(120)
def test_an_environment_that_fails_on_one_rank_ends_all_of_them(tiny_model: Path, folder: Path) -> None:
    """It fails in its second turn, which the other rank may not have."""
    broken = recipe_of("broken", tiny_model, folder, "BrokenOnTheSecondRank", **{"strategy.kind": "fsdp"})
    run_ranks(expect_a_broken_environment, 2, broken)
