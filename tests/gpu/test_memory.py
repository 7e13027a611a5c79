"""The peak that a plan tells against the peak that torch measures on the device, for the same recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.device import DEVICE, ON_DEVICE, DevicePeak
from tests.support.planning import plan_recipe, planned
from tests.support.stepping import full_packs, one_step, random_parts
from trainer.distributed.world import join_world

SHAPE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 20,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
}
PACKS, LENGTH, SAMPLES = 4, 1024, 4
AIM = 0.05
CHECKPOINTING = {"training.gradient_checkpointing": True}
NF4 = {"model.quantization": "nf4"}
FSDP = {"strategy.kind": "fsdp"}
CASES: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora-checkpointing": CHECKPOINTING,
    "lora-float32": {"model.dtype": "float32"},
    "qlora": NF4,
    "qlora-checkpointing": {**NF4, **CHECKPOINTING},
    "qdora-checkpointing": {**NF4, **CHECKPOINTING, "adapter.method": "dora"},
    "full": {"adapter.method": "none"},
    "lora-fsdp": FSDP,
    "qlora-fsdp-checkpointing": {**FSDP, **NF4, **CHECKPOINTING},
    "full-fsdp": {**FSDP, "adapter.method": "none"},
    "qlora-offloaded-tiles": {**NF4, **CHECKPOINTING, "compute": {"offload_activations": True, "tile_tokens": 512}},
    "full-fsdp-offload": {"strategy": {"kind": "fsdp", "offload": True}, "adapter.method": "none"},
}


@pytest.mark.parametrize("case", CASES)
def test_the_plan_tells_the_peak(case: str, tmp_path: Path) -> None:
    common = {
        "model.dtype": "bfloat16",
        "adapter.rank": 16,
        "adapter.dropout": 0.0,
        "data.sequence_length": LENGTH,
        "training.micro_batch": PACKS,
        "training.global_batch": PACKS,
    }
    recipe = plan_recipe(tmp_path, SHAPE, **{**common, **CASES[case], **ON_DEVICE})
    told = planned(recipe).peak_device_bytes
    batch = full_packs(PACKS, LENGTH, SAMPLES)
    with join_world(gpu=True) as world:
        peak = DevicePeak(DEVICE)
        parts = random_parts(recipe, world)
        peak.restart()  # the whole base was on the device, which is not how a sharded run loads it
        for _ in range(2):
            one_step(parts, batch)
        measured = peak.bytes()
    assert told == pytest.approx(measured, rel=AIM)
