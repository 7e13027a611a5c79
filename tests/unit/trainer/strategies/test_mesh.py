"""The shape of the mesh: a pure function of the recipe and the number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.training import small_recipe
from trainer.errors import InputError, RecipeError
from trainer.recipe import Recipe
from trainer.recipe.strategies import Mesh


def recipe(workers: Any, **strategy: Any) -> Recipe:
    changes = {"resources": {"workers": workers}, "strategy": {"kind": "fsdp", **strategy}}
    return small_recipe("mesh", Path("/model"), Path("/folder"), **changes)


def test_ranks_of_a_replica_and_of_a_context_group_have_neighbouring_numbers() -> None:
    mesh = Mesh.of(recipe(16, replicas=2, context_parallel=4), 16)
    assert mesh == Mesh(replicas=2, shards=2, context=4)
    assert [mesh.data_rank(rank) for rank in range(16)] == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    assert [mesh.context_rank(rank) for rank in range(16)] == [0, 1, 2, 3] * 4
    assert [mesh.shard_rank(rank) for rank in range(16)] == [*range(8), *range(8)]


@pytest.mark.parametrize("ranks", range(1, 9))
def test_with_fewer_workers_no_rank_keeps_more_than_planned_where_that_is_possible(ranks: int) -> None:
    mesh = Mesh.of(recipe([1, 8], replicas=2), ranks)
    assert mesh.ranks == ranks
    assert mesh.ranks_per_replica >= min(ranks, 4)
    finer = [n for n in range(1, ranks) if ranks % n == 0 and n >= 4]
    assert mesh.ranks_per_replica == min([*finer, ranks]), "and it has as many replicas as that allows"


def test_without_sharding_each_group_is_a_replica() -> None:
    assert Mesh.of(recipe(4, kind="ddp", context_parallel=2), 4) == Mesh(2, 1, 2)
    assert Mesh.of(recipe(3, kind="zero3"), 3) == Mesh(1, 3, 1)


def test_a_number_of_ranks_that_cannot_be_divided_is_refused() -> None:
    with pytest.raises(InputError, match="context_parallel is 2, which does not divide 3 workers"):
        Mesh.of(recipe([2, 4], context_parallel=2), 3)


@pytest.mark.parametrize(
    ("workers", "strategy", "words"),
    [
        (4, {"replicas": 3}, r"strategy\.replicas: is 3, which does not divide 4 workers"),
        (
            8,
            {"replicas": 4, "context_parallel": 4},
            r"is 4, which does not divide the 2 groups of 4 \(context_parallel\) of 8 workers",
        ),
        ([3, 4], {"context_parallel": 2}, r"strategy\.context_parallel: is 2, which does not divide .*\[3, 4\]"),
        (4, {"kind": "ddp", "replicas": 2}, r"strategy\.replicas: has no effect with strategy\.kind ddp"),
        (4, {"kind": "zero3", "context_parallel": 2}, r"strategy\.context_parallel: has no effect with .* zero3"),
    ],
)
def test_what_cannot_be_divided_is_refused_in_the_recipe(workers: Any, strategy: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        recipe(workers, **strategy)
