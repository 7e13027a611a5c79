"""Architectures that shard in a way of their own train under FSDP2 like one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from tests.support.models import SHARED_BLOCKS, random_model
from tests.support.training import losses, run_of, small_recipe, train_here, train_in_processes, write_pairs
from trainer.errors import InputError
from trainer.run import layout
from trainer.run.jsonl import read_rows

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
ZAMBA2 = transformers.Zamba2Config(
    **SIZES,
    **SHARED_BLOCKS,
    vocab_size=384,
)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("method", ["lora", pytest.param("none", marks=pytest.mark.night)])
def test_blocks_that_several_layers_share(method: str, tiny_model: Path, tmp_path: Path) -> None:
    """Trained whole, copies of a shared block would move apart."""
    write_pairs(tmp_path / "data" / "a.jsonl", 24)
    model = random_model(ZAMBA2, tmp_path / "model", tiny_model)
    settings = {
        **{"adapter.method": method, "training.steps": 3, "compute.attention": "sdpa", "data.packing": False},
        **({} if method == "none" else {"adapter.target_modules": ["q_proj", "o_proj"]}),
    }
    alone = small_recipe("alone", model, tmp_path, **settings)
    sharded = small_recipe("sharded", model, tmp_path, **settings, **{"strategy.kind": "fsdp"})
    assert train_here(alone) == "succeeded"
    train_in_processes([sharded], 2)
    assert losses(sharded) == pytest.approx(losses(alone), abs=1e-5)
    (start,) = (row for row in read_rows(run_of(sharded), layout.EVENTS) if row["event"] == "start")
    size = (model / "model.safetensors").stat().st_size
    assert all(rank["bytes_read"] < 0.9 * size for rank in start["load"])  # each rank has read its part only


LINEAR_ATTENTION = transformers.Qwen3NextConfig(
    **SIZES,
    vocab_size=384,
    num_hidden_layers=2,
    layer_types=["linear_attention", "full_attention"],
    head_dim=16,
    linear_num_key_heads=2,
    linear_num_value_heads=2,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=16,
    mlp_only_layers=[0, 1],
)


@pytest.mark.parametrize("packing", [False, True])
def test_linear_attention_without_its_library(packing: bool, tiny_model: Path, tmp_path: Path) -> None:
    """It trains with what the refusal of packs advises."""
    write_pairs(tmp_path / "data" / "a.jsonl", 12)
    model = random_model(LINEAR_ATTENTION, tmp_path / "model", tiny_model)
    settings = {"training.steps": 1, "adapter.target_modules": ["q_proj", "o_proj"], "data.packing": packing}
    recipe = small_recipe("r", model, tmp_path, **settings)
    if packing:
        with pytest.raises(InputError, match=r"see each other.*; set data\.packing=false"):
            train_here(recipe)
    else:
        assert train_here(recipe) == "succeeded"
        (start,) = (row for row in read_rows(run_of(recipe), layout.EVENTS) if row["event"] == "start")
        assert start["attention"] == "varlen"


MIXTURE = transformers.MixtralConfig(
    **{**SIZES, "head_dim": 16}, vocab_size=384, num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2
)


@pytest.mark.night
@pytest.mark.timeout(600)
def test_the_router_loss_of_any_strategy(tiny_model: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path / "data" / "a.jsonl", 48)
    model = random_model(MIXTURE, tmp_path / "model", tiny_model)
    settings = {
        **{"adapter.target_modules": ["q_proj", "v_proj"], "adapter.dropout": 0.0, "training.steps": 3},
        **{"training.router_aux_loss_coef": 0.5, "optimizer.lr": 0.02},
    }
    alone = small_recipe("alone", model, tmp_path, **settings)
    assert train_here(alone) == "succeeded"
    places = [
        {"strategy.kind": "ddp", "training.micro_batch": 1},
        {"strategy.kind": "fsdp", "training.gradient_checkpointing": True},
        {"strategy.kind": "zero3"},
    ]
    several = [small_recipe(f"r{i}", model, tmp_path, **settings, **place) for i, place in enumerate(places)]
    train_in_processes(several, 2)
    want = [row for row in read_rows(run_of(alone), layout.METRICS) if "loss" in row]
    for recipe in several:
        rows = [row for row in read_rows(run_of(recipe), layout.METRICS) if "loss" in row]
        for field in ("loss", "router_aux_loss", "grad_norm", "expert_load_max", "experts_unused"):
            found = pytest.approx([row[field] for row in want], abs=1e-5)
            assert [row[field] for row in rows] == found, (recipe.strategy.kind, field)
