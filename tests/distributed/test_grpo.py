"""GRPO on several ranks: the same texts, rewards and losses as on one, written by the model or by a server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.fake_vllm import FakeVLLM, serving
from tests.support.ranks import run_ranks
from tests.support.tasks import task_recipe, write_task_data
from tests.support.training import adapter_bytes, run_of, train_in_processes, train_rank
from trainer.errors import EngineFailed
from trainer.recipe import Recipe
from trainer.run import layout
from trainer.run.jsonl import read_rows
from trainer.storage import open_storage
from trainer.tasks.rollouts.store import RolloutStore

COMPARED = ("loss", "reward", "group_reward_std", "policy_loss", "entropy", "kl", "grad_norm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grpo")
    write_task_data(folder, "grpo")
    return folder


def metrics(recipe: Recipe) -> list[dict[str, Any]]:
    return [row for row in read_rows(run_of(recipe), layout.METRICS) if "loss" in row]


def same_metrics(one: Recipe, many: Recipe) -> None:
    for want, got in zip(metrics(one), metrics(many), strict=True):
        for name in COMPARED:
            assert got[name] == pytest.approx(want[name], rel=1e-4, abs=1e-4), name


@pytest.mark.night  # by day, test_tasks has two ranks
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("kind", "ranks"), [("ddp", 2), ("fsdp", 2), ("zero3", 2), ("fsdp", 3)])
def test_one_rank_and_several_learn_the_same(kind: str, ranks: int, tiny_model: Path, folder: Path) -> None:
    changes = {"training.steps": 3}
    one = task_recipe("grpo", f"one-{kind}-{ranks}", tiny_model, folder, **changes)
    many = task_recipe("grpo", f"{kind}-{ranks}", tiny_model, folder, **{"strategy.kind": kind, **changes})
    train_in_processes([one], 1)
    train_in_processes([many], ranks)
    same_metrics(one, many)


@pytest.mark.timeout(120)
def test_exact_holds_for_it_too(tiny_model: Path, folder: Path) -> None:
    changes = {"exact": True, "training.steps": 2, "training.eval_every": None}
    recipes = [task_recipe("grpo", f"exact-{ranks}", tiny_model, folder, **changes) for ranks in (1, 2)]
    for ranks, recipe in enumerate(recipes, 1):
        train_in_processes([recipe], ranks)
    assert adapter_bytes(recipes[0]) == adapter_bytes(recipes[1])


def of_server(name: str, fake: FakeVLLM, model: Path, folder: Path, **changes: Any) -> Recipe:
    settings = {
        "rollout": {"engine": "vllm", "addresses": [fake.address], "max_staleness": 1},
        "training.steps": 3,
        "data.eval": [],
        "training.eval_every": None,
    }
    return task_recipe("grpo", name, model, folder, **{**settings, **changes})


@pytest.mark.timeout(180)
def test_a_server_writes_for_all_ranks(tiny_model: Path, folder: Path) -> None:
    fake = FakeVLLM(tiny_model)
    with serving(fake):
        one = of_server("served-1", fake, tiny_model, folder)
        two = of_server("served-2", fake, tiny_model, folder, **{"strategy.kind": "fsdp"})
        train_in_processes([one], 1)
        train_in_processes([two], 2)
    same_metrics(one, two)
    assert [row["staleness_max"] for row in metrics(two)] == [0.0, 1.0, 1.0]
    assert metrics(two)[0]["logp_mismatch"] < 1e-4
    texts = [
        [r.tokens for r in RolloutStore(open_storage(recipe.storage).child(recipe.name), 9)._read(3)]
        for recipe in (one, two)
    ]
    assert texts[0] == texts[1]


def expect_a_failed_engine(rank: int, recipe: Recipe) -> None:
    with pytest.raises(EngineFailed, match="was asked for a text of"):
        train_rank(rank, [recipe])


@pytest.mark.night
@pytest.mark.timeout(180)
def test_a_server_that_fails_ends_all_ranks(tiny_model: Path, folder: Path) -> None:
    fake = FakeVLLM(tiny_model)
    fake.faults.model = "another"
    with serving(fake):
        run_ranks(expect_a_failed_engine, 2, of_server("failing", fake, tiny_model, folder))
