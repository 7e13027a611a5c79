"""Texts in the plan: the cache of the model that writes them, a server's share of a GPU, and a reward model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from launcher.plan.estimate import make
from launcher.plan.table import first_lines, report
from tests.support.planning import SMALL, config_folder, plan_recipe, planned
from trainer.plan.config import read_base
from trainer.plan.first_estimate import first_estimate
from trainer.plan.result import Limits
from trainer.plan.rollout_memory import DRAWING_BYTES, rows_of, text_numbers, writing_bytes
from trainer.recipe import Recipe, dump
from trainer.run import layout

GIB = 2**30
REWARD = {"function": "trainer.tasks.rewards.shipped:gsm8k"}
GPU = {"resources.gpus_per_worker": 1}
VLLM = {"rollout": {"engine": "vllm", "vllm": {"python": "/opt/vllm/bin/python"}}}
TOKENS = {"data.sequence_length": 30, "grpo.max_new_tokens": 10}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "a head_dim of its own": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 32},
    "windows": {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "sliding_window": 16,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"] * 2,
    },
    "latent": {
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        "num_key_value_heads": 4,
        "head_dim": 8,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_nope_head_dim": 12,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "first_k_dense_replace": 5,
    },
    "other names": {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "num_key_value_heads": None},
}


def writing(folder: Path, shape: dict[str, Any] | None = None, **changes: Any) -> Recipe:
    given = {"task": "grpo", "grpo.reward": REWARD, "data.packing": False, "model.dtype": "bfloat16", **TOKENS}
    return plan_recipe(folder, {**SMALL, **(shape or {})}, **{**given, **changes})


@pytest.mark.parametrize("shape", SHAPES)
def test_the_cache_is_the_one_that_transformers_keeps(shape: str, tmp_path: Path) -> None:
    recipe = writing(tmp_path, SHAPES[shape], **{"training.micro_batch": 1, "grpo.group_size": 3})
    config = read_base(recipe.model).config
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        cache = model(torch.ones(3, 39, dtype=torch.int64), use_cache=True).past_key_values
        cache = model(torch.ones(3, 1, dtype=torch.int64), use_cache=True, past_key_values=cache).past_key_values
    kept = [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers]
    drawing = 3 * config.get_text_config().vocab_size * DRAWING_BYTES
    found = writing_bytes(recipe, text_numbers(config.get_text_config()))
    # A window's cache has one token less than the window between two tokens.
    assert found - drawing == pytest.approx(sum(kept) + max(kept) // 2, rel=0.04)
    if shape != "windows":
        assert found - drawing == sum(kept) + max(kept) // 2


def test_what_is_written_at_a_time_decides(tmp_path: Path) -> None:
    few = writing(tmp_path, **{"training.micro_batch": 2, "grpo.group_size": 4})
    assert rows_of(few) == 8
    assert rows_of(writing(tmp_path, **{"training.micro_batch": 2, "grpo.eval_answers": 16})) == 32
    assert rows_of(writing(tmp_path, **VLLM)) == 0
    ppo = {"task": "ppo", "ppo.reward": REWARD, "data.packing": False, "training.micro_batch": 2}
    assert rows_of(plan_recipe(tmp_path, **ppo)) == 2
    assert rows_of(plan_recipe(tmp_path)) == 0


def test_texts_are_at_the_peak_when_they_need_more_than_learning(tmp_path: Path) -> None:
    few, many = (planned(writing(tmp_path, **{"grpo.group_size": size})).largest for size in (2, 2000))
    assert few.writing_bytes < few.activation_bytes
    assert many.writing_bytes == 1000 * few.writing_bytes > many.activation_bytes
    more = many.peak_device_bytes - few.peak_device_bytes
    assert more == many.writing_bytes - few.activation_bytes
    estimates = [first_estimate(writing(tmp_path, **{"grpo.group_size": size}), SMALL, 1) for size in (2, 2000)]
    assert [one and one.writing_bytes for one in estimates] == [few.writing_bytes, many.writing_bytes]


def test_a_server_takes_its_share_of_the_gpu(tmp_path: Path) -> None:
    recipe = writing(tmp_path, **GPU, **VLLM)
    without, counted = planned(recipe), planned(recipe, limits=Limits(10 * GIB))
    assert without.largest.server_bytes == without.largest.writing_bytes == 0
    assert counted.largest.server_bytes == 4 * GIB
    assert counted.peak_device_bytes == without.peak_device_bytes + 4 * GIB
    given = {"rollout": {"engine": "vllm", "addresses": ["http://10.0.0.7:8000"]}}
    assert planned(writing(tmp_path, **GPU, **given), limits=Limits(10 * GIB)).largest.server_bytes == 0
    assert "  GiB per rank: the vLLM server             4.00" in list(first_lines(recipe, 10 * GIB))


def test_servers_with_gpus_of_their_own_take_nothing(tmp_path: Path) -> None:
    beside = {"rollout": {"engine": "vllm", "vllm": {"python": "/opt/vllm/bin/python", "servers": 2}}}
    recipe = writing(tmp_path, **GPU, **beside)
    assert planned(recipe, limits=Limits(10 * GIB)).largest.server_bytes == 0
    notes = make(recipe, 10 * GIB, None, None, None).plan.notes
    assert any(note.startswith("2 vLLM servers beside the training take nothing from it; each GPU") for note in notes)


def test_the_table_names_what_texts_take(tmp_path: Path) -> None:
    found = make(writing(tmp_path, **GPU, **VLLM), 10 * GIB, None, None, None)
    lines = list(report(found))
    assert any(line.split() == ["the", "vLLM", "server", "4.00"] for line in lines)
    texts = found.recipe.training.global_batch
    assert f"texts per step      {8 * texts} ({texts} prompts; 10 tokens at most)" in lines
    assert any("on the first GPU of each node" in note for note in found.plan.notes)
    cpu = make(writing(tmp_path, **VLLM), 10 * GIB, None, None, None).plan
    assert cpu.largest.server_bytes == 0
    assert any("is not counted" in note for note in cpu.notes)
    here = list(report(make(writing(tmp_path, **{"grpo.group_size": 2000}), None, None, None, None)))
    assert any("or, before the forward: texts" in line for line in here)


def test_a_reward_model_of_its_own_is_counted_on_each_rank(tmp_path: Path) -> None:
    shape = {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1, "dtype": "float32"}
    other = config_folder(tmp_path / "reward", **shape)
    changes = {"grpo.reward": {"model": str(other)}, "resources.workers": 2, "strategy.kind": "fsdp"}
    plan = make(writing(tmp_path, **changes), None, None, None, None).plan
    config = read_base(plan_recipe(tmp_path).model).config
    config.num_labels = 1
    model = transformers.AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    size = sum(p.nbytes for p in model.parameters())
    assert [rank.reward_bytes for rank in plan.ranks] == [size, size]
    without = planned(writing(tmp_path, **{**changes, "grpo.reward": REWARD}), 2)
    assert plan.peak_device_bytes == without.peak_device_bytes + size
    assert any("is a second model" in note for note in plan.notes)


def test_a_reward_run_on_the_same_base_is_not_counted_and_one_out_of_reach_is_reported(tmp_path: Path) -> None:
    place = tmp_path / "rating"
    policy = writing(tmp_path, **{"grpo.reward": {"model": str(place)}})
    pairs = [{"path": f"{tmp_path}/*.jsonl", "format": "preference"}]
    rating = plan_recipe(tmp_path, **{"task": "reward", "data.train": pairs, "data.packing": False})
    place.mkdir()
    (place / layout.RECIPE).write_text(dump(rating))
    plan = make(policy, None, None, None, None).plan
    assert plan.largest.reward_bytes == 0
    assert any("shares the policy's base model" in note for note in plan.notes)
    away = writing(tmp_path, **{"grpo.reward": {"model": f"{tmp_path}/nothing"}})
    assert any("is NOT counted" in note for note in make(away, None, None, None, None).plan.notes)
