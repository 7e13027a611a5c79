"""PPO on several ranks: the same texts, rewards and losses as on one, with the reward model on the policy's base."""

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

PLACES = [("ddp", 1), ("ddp", 2), ("fsdp", 2), ("zero2", 2), ("zero3", 2), ("fsdp", 3)]
COMPARED = ("loss", "reward", "kl", "policy_loss", "value_loss", "entropy", "value_explained_variance", "grad_norm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ppo")
    for task in ("ppo", "reward"):
        write_task_data(folder, task)
    return folder


@pytest.fixture(scope="module")
def runs(tiny_model: Path, folder: Path) -> dict[tuple[str, int], Recipe]:
    rater = task_recipe("reward", "rater", tiny_model, folder, **{"training.steps": 3, "training.eval_every": None})
    train_in_processes([rater], 2)
    reward = {"ppo.reward": {"model": run_of(rater).url}, "training.steps": 4, "ppo.missing_eos_penalty": 0.0}
    made: dict[tuple[str, int], Recipe] = {}
    for ranks in (1, 2, 3):
        some = {
            (kind, n): task_recipe("ppo", f"{kind}-{n}", tiny_model, folder, **{"strategy.kind": kind, **reward})
            for kind, n in PLACES
            if n == ranks
        }
        train_in_processes(list(some.values()), ranks)
        made |= some
    return made


def texts_of(recipe: Recipe) -> list[list[Any]]:
    events = [event for event in read_rows(run_of(recipe), layout.EVENTS) if event["event"] == "texts"]
    return [[(text["sample"], text["text"]) for text in event["texts"]] for event in events]


@pytest.mark.night  # by day, test_tasks has two ranks
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("kind", "ranks"), PLACES[1:])
def test_one_rank_and_several_write_and_learn_the_same(runs: Any, kind: str, ranks: int) -> None:
    one, many = runs["ddp", 1], runs[kind, ranks]
    assert texts_of(many) == texts_of(one)
    assert len(texts_of(one)) == 4
    rows = [[r for r in read_rows(run_of(recipe), layout.METRICS) if "loss" in r] for recipe in (one, many)]
    for want, got in zip(*rows, strict=True):
        for name in COMPARED:
            assert got[name] == pytest.approx(want[name], rel=1e-4, abs=1e-4), name
    assert rows[0][0]["reward_std"] > 0


@pytest.mark.timeout(120)
def test_exact_holds_for_it_too(tiny_model: Path, folder: Path) -> None:
    changes = {"exact": True, "training.steps": 2, "training.eval_every": None}
    recipes = [task_recipe("ppo", f"exact-{ranks}", tiny_model, folder, **changes) for ranks in (1, 2)]
    for ranks, recipe in enumerate(recipes, 1):
        train_in_processes([recipe], ranks)
    assert adapter_bytes(recipes[0]) == adapter_bytes(recipes[1])


def expect_a_broken_reward(rank: int, recipe: Recipe) -> None:
    with pytest.raises(RewardFailed, match=r"step 1, rank 1: .*broken_on_the_second_rank returned nan"):
        train_rank(rank, [recipe])


@pytest.mark.timeout(120)
def test_a_reward_that_breaks_on_one_rank_ends_all_of_them(tiny_model: Path, folder: Path) -> None:
    spec = {"ppo.reward": {"function": "tests.support.rewards:broken_on_the_second_rank"}}
    run_ranks(expect_a_broken_reward, 2, task_recipe("ppo", "broken", tiny_model, folder, **spec))


@pytest.mark.timeout(180)
def test_it_ends_them_where_a_model_rates_too(tiny_model: Path, folder: Path) -> None:
    """The model's forward is a collective under fsdp: no rank may fail before the last one of a step."""
    few = {"training.steps": 1, "training.eval_every": None, "training.micro_batch": 1}
    rater = task_recipe("reward", "beside", tiny_model, folder, **few)
    train_in_processes([rater], 1)
    both = {"function": "tests.support.rewards:broken_on_the_second_rank", "model": run_of(rater).url}
    changes = {**few, "ppo.reward": both, "strategy.kind": "fsdp"}
    run_ranks(expect_a_broken_reward, 2, task_recipe("ppo", "both-broken", tiny_model, folder, **changes))
