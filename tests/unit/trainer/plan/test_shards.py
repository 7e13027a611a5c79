"""The bytes that a plan gives each rank are those that sharding really gives it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.nights import few_by_day
from tests.support.planning import LLAMA_70B, plan_recipe, planned
from trainer.plan.config import read_base
from trainer.plan.fake_process_group import fake_world
from trainer.plan.memory import read_model
from trainer.plan.meta_model import skeleton
from trainer.plan.shards import share, weights_of
from trainer.recipe import Recipe, load
from trainer.recipe.strategies import Mesh
from trainer.strategies import make_strategy
from trainer.strategies.shards import Weight, chunk_rows

ROOT = Path(__file__).resolve().parents[4]
MODELS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora-bfloat16": {"adapter.method": "dora", "model.dtype": "bfloat16"},
    "nf4": {"model.quantization": "nf4", "model.dtype": "bfloat16"},
    "nf4-float32": {"model.quantization": "nf4"},
    "full": {"adapter.method": "none", "model.dtype": "bfloat16"},
}


def really_kept(recipe: Recipe, ranks: int, rank: int) -> dict[str, int]:
    """Read off the strategy's own wrapping in a fake process group."""
    kept = {"frozen": 0, "trainable": 0, "padding": 0}
    with fake_world(ranks, rank) as world:
        model = make_strategy(recipe, world).wrap(skeleton(recipe, read_base(recipe.model).config))
        for parameter in model.parameters():
            local = parameter.to_local()  # type: ignore[attr-defined]
            size = local.numel() * local.element_size()
            kept["trainable" if parameter.requires_grad else "frozen"] += size
            kept["padding"] += local.untyped_storage().nbytes() - size
    return kept


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("replicas", "context", "ranks", "some"),
    few_by_day(
        [
            *((1, 1, 3, (0, 1, 2)), (4, 2, 24, (0, 5, 6, 23))),
            *((1, 1, 1, (0,)), (1, 1, 16, (0, 3, 15)), (1, 1, 64, (0, 8, 63))),
        ],
        2,
    ),
)
def test_every_rank_of_fsdp(
    tmp_path: Path, model: str, replicas: int, context: int, ranks: int, some: tuple[int, ...]
) -> None:
    shape = {"strategy.replicas": replicas, "strategy.context_parallel": context, "resources.workers": ranks}
    recipe = plan_recipe(tmp_path, **{"strategy.kind": "fsdp", **shape, **MODELS[model]})
    weights = read_model(recipe, read_base(recipe.model).config).weights
    for rank in some:
        mesh = Mesh.of(recipe, ranks)
        got = share("fsdp", weights, mesh, rank, gradient_size=4, state=lambda weight, elements: 8 * elements)
        want = really_kept(recipe, ranks, rank)
        assert {"frozen": got.frozen, "trainable": got.trainable, "padding": got.padding} == want
        assert got.gradient == got.trainable
        assert got.optimizer == 2 * got.trainable


@pytest.mark.night
@pytest.mark.parametrize(
    "overrides",
    [
        ("strategy.replicas=8", "resources.workers=64"),
        ("strategy.context_parallel=8", "data.sequence_length=131072", "resources.workers=64"),
    ],
)
def test_every_rank_of_a_70b(overrides: tuple[str, ...]) -> None:
    recipe = load(ROOT / "recipes" / "llama3_70b_qlora_fsdp.yaml", list(overrides))
    plan = planned(recipe, 64)
    for rank in (0, 16, 63):
        told = plan.ranks[rank]
        want = really_kept(recipe, 64, rank)
        assert (told.frozen_bytes, told.trainable_bytes) == (want["frozen"], want["trainable"])
        assert told.padding_bytes == want["padding"]


def test_ranks_differ_where_rows_do(tmp_path: Path) -> None:
    """lora_A has as many rows as the rank of the adapter: 16 of 64 ranks have one, the others none."""
    recipe = plan_recipe(tmp_path, **{"strategy.kind": "fsdp", "adapter.rank": 16})
    ranks = planned(recipe, 64).ranks
    assert [r.rank for r in ranks] == list(range(64))
    assert ranks[0].trainable_bytes == ranks[8].trainable_bytes > ranks[16].trainable_bytes
    assert ranks[63].frozen_bytes < ranks[0].frozen_bytes
    assert ranks[63].padding_bytes > ranks[0].padding_bytes
    whole = planned(recipe, 1).ranks[0]
    for name in ("frozen_bytes", "trainable_bytes", "gradient_bytes", "optimizer_bytes"):
        assert sum(getattr(r, name) for r in ranks) == getattr(whole, name), name


@pytest.mark.parametrize("rows", [1, 5, 16, 63, 64, 65, 515])
@pytest.mark.parametrize("ranks", [1, 2, 7, 64])
def test_rows_are_cut_as_torch_cuts_them(rows: int, ranks: int) -> None:
    pieces = [len(piece) for piece in torch.arange(rows).chunk(ranks)]
    assert [chunk_rows(rows, ranks, rank) for rank in range(ranks)] == pieces + [0] * (ranks - len(pieces))


@pytest.mark.parametrize(
    ("kind", "parameter", "states"),
    [("ddp", 105, 105), ("fsdp", 45, 45), ("zero2", 105, 35), ("zero3", 35, 35)],
)
def test_what_each_strategy_divides(kind: str, parameter: int, states: int) -> None:
    from collections import Counter

    weights = Counter([Weight((7, 15), 4, True)])
    first = share(kind, weights, Mesh(1, 3, 1), 0, gradient_size=4, state=lambda weight, elements: 8 * elements)
    assert first.trainable == 4 * parameter
    assert (first.gradient, first.optimizer) == (4 * states, 8 * states)


def test_tied_weights_count_once(tmp_path: Path) -> None:
    shape = {**LLAMA_70B, "num_hidden_layers": 1, "tie_word_embeddings": True}
    tied = plan_recipe(tmp_path, shape, **{"adapter.method": "none"})
    model = skeleton(tied, read_base(tied.model).config)
    embeddings = Weight((128256, 8192), 4, True, in_layer=False)
    assert weights_of(model)[embeddings] == 1


@pytest.mark.parametrize(("quantization", "rank", "frozen"), [("none", 0, 2_204_803_328), ("nf4", 63, 600_482_048)])
def test_a_70b_on_64_ranks(tmp_path: Path, quantization: str, rank: int, frozen: int) -> None:
    changes = {"model.quantization": quantization, "model.dtype": "bfloat16", "strategy.kind": "fsdp"}
    recipe = plan_recipe(tmp_path, LLAMA_70B, **changes)
    model = read_model(recipe, read_base(recipe.model).config)
    assert model.total - model.trainable == 70_553_706_496
    got = share(
        "fsdp", model.weights, Mesh(1, 64, 1), rank, gradient_size=4, state=lambda weight, elements: 8 * elements
    )
    assert got.frozen == frozen
    # Scales of 64 values in a byte, and of 256 such scales in four; 4.28 GB without double quantisation.
    linear = 68_451_041_280
    tables = 7 * 80 * (4 * 16 + 4 * 256 + 4)
    assert model.quant_state == (linear // 64 + linear // 64 // 64 + tables if quantization == "nf4" else 0)
