"""Operations of a step: against those that torch counts while it runs one, and the share of the peak that they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.support.looping import bench
from tests.support.planning import EIGHT_LAYERS as SHAPE
from tests.support.planning import plan_recipe
from tests.support.stepping import full_packs, one_step, random_parts
from tests.support.training import small_recipe, write_pairs
from trainer.data import Batch
from trainer.distributed.world import World, join_world
from trainer.worker.mfu import Attention, Meter, Operations, meter_of, operations_of, peak_flops

FULL = {"adapter.method": "none"}
CHECKPOINTING = {"training.gradient_checkpointing": True}


def counted(recipe: Any, batch: Batch) -> tuple[float, Operations]:
    """The floating-point operations that torch counts in a step: those of products of matrices."""
    with join_world(gpu=False) as world:
        parts = random_parts(recipe, world)
        with FlopCounterMode(display=False) as counter:
            one_step(parts, batch)
    return float(counter.get_total_flops()), parts.operations


@pytest.mark.parametrize(
    ("changes", "bound"), [({}, 0.05), (FULL, 0.01), (CHECKPOINTING, 0.08), ({**FULL, **CHECKPOINTING}, 0.08)]
)
def test_operations_are_those_that_torch_counts(changes: dict[str, Any], bound: float, tmp_path: Path) -> None:
    """With samples this short, attention is a part of a hundred. The first layer's input needs no gradient, which the
    formula, made for models of many layers, does not take off; and where layers are computed again, torch stops
    before the last product of each."""
    recipe = plan_recipe(tmp_path, SHAPE, **{"model.dtype": "float32", "adapter.dropout": 0.0, **changes})
    batch = full_packs(2, 16, samples=2, vocabulary=384)
    found, operations = counted(recipe, batch)
    told = operations.step(batch.tokens, batch.target_tokens, operations.scores(batch))
    if "training.gradient_checkpointing" in changes:
        told += operations.again(batch.tokens, operations.scores(batch))
    assert told == pytest.approx(found, rel=bound)


def test_the_head_counts_at_targets_only(tmp_path: Path) -> None:
    shape = {**SHAPE, "vocab_size": 8192, "num_hidden_layers": 2}
    recipe = plan_recipe(tmp_path, shape, **{"model.dtype": "float32", "adapter.dropout": 0.0})
    batch = full_packs(2, 64, vocabulary=384)
    batch.targets[:, :48] = False
    batch.target_tokens = int(batch.targets.sum())
    found, operations = counted(recipe, batch)
    assert operations.head_frozen == 128 * 8192
    told = operations.step(batch.tokens, batch.target_tokens, operations.scores(batch))
    assert told == pytest.approx(found, rel=0.08), "of two layers, the first one's input needs no gradient"
    everywhere = operations.step(batch.tokens, batch.tokens, operations.scores(batch))
    assert everywhere > 2 * found


def test_what_an_adapter_trains_counts_six_times_and_the_base_four(tmp_path: Path) -> None:
    recipe = plan_recipe(tmp_path, SHAPE, **{"model.quantization": "nf4", "adapter.rank": 2})
    with join_world(gpu=False) as world:
        operations = random_parts(recipe, world).operations
    layer = 128 * 128 * 2 + 128 * 64 * 2 + 3 * 128 * 256
    adapter = 2 * (4 * 128 + 128 * 2 + 64 * 2 + 3 * (128 + 256))
    assert operations.frozen == 8 * layer, "of packed weights too"
    assert operations.trained == 8 * adapter
    assert operations.attention == (Attention(8, 128),)
    plain = Operations(operations.frozen, operations.trained)
    assert plain.step(10, 0, 0.0) == 10 * 8 * (4 * layer + 6 * adapter)


@pytest.mark.parametrize(
    ("attention", "seen"),
    [
        (Attention(1, 1), lambda query, key: key <= query),
        (Attention(1, 1, reach=2), lambda query, key: query - 2 <= key <= query),
        (Attention(1, 1, causal=False), lambda query, key: True),
        (Attention(1, 1, causal=False, reach=2), lambda query, key: abs(query - key) <= 2),
    ],
)
def test_pairs_are_those_of_the_samples(attention: Attention, seen: Any) -> None:
    lengths = [5, 3, 1, 7]
    positions = np.zeros((2, 12), np.int64)  # 4 pads in each row
    positions[0, :8], positions[1, :8] = [*range(5), *range(3)], [0, *range(7)]
    want = sum(bool(seen(q, k)) for s in lengths for q in range(s) for k in range(s))
    assert attention.pairs(positions, tokens=16) == want


def test_experts_count_by_the_share_that_a_token_goes_through() -> None:
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = operations_of(model)
    attention, router, experts = 4 * 32 * 32, 8 * 32, 2 * 3 * 32 * 16
    assert found.trained == 2 * (attention + router + experts)
    assert (found.head_trained, found.frozen) == (32 * 64, 0)


@pytest.mark.parametrize(("kind", "want"), [("mistral", Attention(2, 64, reach=7)), ("bert", Attention(2, 64, False))])
def test_how_a_model_attends_is_read_off_it(kind: str, want: Attention) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    windowed = {"sliding_window": 8, "num_key_value_heads": 4} if kind == "mistral" else {}
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(kind, vocab_size=32, **sizes, **windowed)
    auto = AutoModelForCausalLM if kind == "mistral" else AutoModelForSequenceClassification
    with torch.device("meta"):
        assert operations_of(auto.from_config(config)).attention == (want,)


def test_utilisation_is_the_share_of_the_peak() -> None:
    operations = Operations(frozen=100.0, trained=10.0, attention=(Attention(1, 8),))
    meter = Meter(operations, peak=1e6)
    step = 4 * 100 * 50 + 6 * 10 * 50 + 12 * 300
    assert meter.utilisation(50, 0, 300.0, 2.0) == (step / 2e6, step / 2e6)
    again = 2 * 110 * 50 + 4 * 300
    recomputing = Meter(operations, peak=1e6, recomputes=True).utilisation(50, 0, 300.0, 2.0)
    assert recomputing == (step / 2e6, (step + again) / 2e6)
    reference = 2 * 100 * 50 + 4 * 300
    referring = Meter(operations, peak=1e6, other_forwards=1).utilisation(50, 0, 300.0, 2.0)
    assert referring == ((step + reference) / 2e6, (step + reference) / 2e6)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA A10G", None),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_the_peak_goes_by_the_name_of_the_device(name: str, tflops: float | None) -> None:
    assert peak_flops(name) == (None if tflops is None else tflops * 1e12)


def test_metrics_hold_the_share_where_the_peak_is_known(tiny_model: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path / "data" / "a.jsonl", 40)
    recipe = small_recipe("r", tiny_model, tmp_path, **{"training.steps": 2, "compute": {"peak_tflops": 0.5}})
    with bench(recipe) as parts:
        operations = operations_of(parts.model)
        meter = meter_of(recipe, parts.world, operations)
        assert meter is not None
        assert meter.peak == 0.5e12
        start = parts.start()
        loop = parts.loop()
        loop.meter = meter
        with parts.stream.prefetch(start.cursor, 0, 1) as steps:
            loop.run(start, steps)
    row = parts.rows[0]
    batches = [batch for step, fed in parts.fed if step == 1 for batch in fed]
    scores = sum(operations.scores(batch) for batch in batches)
    used = operations.step(row["tokens"], row["target_tokens"], scores)
    assert row["mfu"] == row["hfu"] == pytest.approx(used / row["step_s"] / 0.5e12)
    assert row["tokens_per_s_per_worker"] == row["tokens_per_s"]


def test_without_a_peak_there_is_no_share(tiny_model: Path, tmp_path: Path) -> None:
    recipe = small_recipe("r", tiny_model, tmp_path)
    with join_world(gpu=False) as world:
        assert meter_of(recipe, world, Operations(1.0, 1.0)) is None


def test_ppo_is_not_counted(tiny_model: Path, tmp_path: Path) -> None:
    known = {"compute": {"peak_tflops": 1.0}}
    recipe = small_recipe("r", tiny_model, tmp_path, **known)
    with join_world(gpu=False) as world:
        assert meter_of(recipe, world, Operations(1.0, 1.0)) is not None
        ppo = recipe.model_copy(update={"task": "ppo"})
        assert meter_of(ppo, world, Operations(1.0, 1.0)) is None


def test_the_peak_is_that_of_all_ranks(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = small_recipe("r", tiny_model, tmp_path)
    three = World(0, 3, 0, torch.device("cpu"))
    for peaks, want in (([1e12, 2e12, 3e12], 6e12), ([1e12, None, 3e12], None)):
        monkeypatch.setattr(World, "all_gather", lambda self, value, peaks=peaks: peaks)
        meter = meter_of(recipe, three, Operations(1.0, 1.0))
        assert (meter and meter.peak) == want
