"""What the GPU's tests and benchmark are made of, on a CPU and with tiny shapes."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from tests.support.attention import difference, gradient_of, lone_loss, packed_loss, random_llama
from tests.support.device import HAS_GPU, NO_GPU
from tests.support.models import CPU, packed
from tests.support.planning import EIGHT_LAYERS as SHAPE
from tests.support.planning import plan_recipe
from tests.support.stepping import full_packs, one_step, random_parts
from trainer.distributed.world import join_world
from trainer.model.meta import four_bit_layers

SMALL = {**SHAPE, "num_hidden_layers": 2}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_pack_trains_like_its_samples_one_by_one(attention: str) -> None:
    batch = packed([[20, 9], [16]])
    model = random_llama(CPU, torch.float32, attention, **TINY)
    alone = lone_loss(model, batch, CPU)
    together = packed_loss(model, batch, CPU)
    assert together.item() == pytest.approx(alone.item(), rel=1e-5)
    assert difference(gradient_of(model, together), gradient_of(model, alone)) <= 1e-4


def test_samples_that_see_each_other_move_the_gradient_by_tenths() -> None:
    batch = packed([[20, 9], [16]])
    model = random_llama(CPU, torch.float32, **TINY)
    want = gradient_of(model, lone_loss(model, batch, CPU))
    batch.position_ids[:] = range(batch.position_ids.shape[1])
    assert difference(gradient_of(model, packed_loss(model, batch, CPU)), want) > 0.1


CHANGES: list[dict[str, Any]] = [
    {},
    {"model.quantization": "nf4"},
    {"model.quantization": "nf4", "adapter.method": "dora", "training.gradient_checkpointing": True},
    {"adapter.method": "none"},
    {"strategy.kind": "fsdp", "model.quantization": "nf4"},
    {"strategy": {"kind": "fsdp", "offload": True}},
]


@pytest.mark.parametrize("changes", CHANGES)
def test_random_weights_train(changes: dict[str, Any], tmp_path: Path) -> None:
    recipe = plan_recipe(tmp_path, SMALL, **{"model.dtype": "bfloat16", "adapter.dropout": 0.0, **changes})
    batch = full_packs(2, 64, samples=2, vocabulary=384)
    with join_world(gpu=False) as world:
        parts = random_parts(recipe, world)
        assert len(four_bit_layers(parts.strategy.model)) == (14 if "model.quantization" in changes else 0)
        losses = [float(one_step(parts, batch, lr=1e-2)) for _ in range(4)]
    assert losses[0] == pytest.approx(5.95, abs=0.1), "the logarithm of the vocabulary"
    assert losses[-1] < losses[0]


def test_full_packs() -> None:
    batch = full_packs(2, 6, samples=3)
    assert batch.position_ids.tolist() == [[0, 1, 0, 1, 0, 1]] * 2
    assert (batch.tokens, batch.target_tokens) == (12, 6)
    with pytest.raises(AssertionError, match="4 samples do not fill 6 tokens"):
        full_packs(2, 6, samples=4)


def test_the_benchmark_measures_a_step(tmp_path: Path) -> None:
    given = argparse.Namespace(length=32, packs=2, samples=2)
    recipe = gpu.recipe_of("nf4-lora-ckpt", tmp_path, given, SMALL)
    assert recipe.model.quantization == "nf4"
    with join_world(gpu=False) as world:
        found = gpu.measured(recipe, world, samples=2, steps=1)
    assert found.seconds > 0
    assert found.flops > 64 * 4 * 2 * (128 * 128 * 2 + 128 * 64 * 2 + 3 * 128 * 256)


@pytest.mark.skipif(HAS_GPU, reason="there is a CUDA device here")
def test_without_a_gpu_the_benchmark_says_so() -> None:
    file = Path(gpu.__file__)
    done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, check=True, cwd=file.parents[1])
    assert done.stdout.strip() == f"nothing measured: {NO_GPU}"
