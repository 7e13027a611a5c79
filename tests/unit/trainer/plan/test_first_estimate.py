"""The estimate before anything is measured: near the plan, in milliseconds, without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.plan.table import first_lines
from tests.support.planning import EIGHT_LAYERS, LLAMA_70B, config_folder, plan_recipe, planned
from trainer.plan.first_estimate import first_estimate, read_numbers
from trainer.recipe import dump

ROOT = Path(__file__).resolve().parents[4]
WIDE = {**EIGHT_LAYERS, "hidden_size": 256, "vocab_size": 4096}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": WIDE,
    "tied": {**WIDE, "tie_word_embeddings": True},
    "head_dim": {**WIDE, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 128},
    "gemma": {**WIDE, "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "head_dim": 64},
    "without a gate": {**WIDE, "model_type": "starcoder2", "architectures": ["Starcoder2ForCausalLM"]},
    "experts": {
        **WIDE,
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "head_dim": 64,
    },
    "mixtral": {**WIDE, "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 4},
}
CHANGES: dict[str, dict[str, Any]] = {
    "lora": {},
    "two targets": {"adapter.target_modules": ["q_proj", "down_proj"]},
    "full": {"adapter": {"method": "none"}},
    "nf4": {"model.quantization": "nf4"},
    "half": {"model.dtype": "bfloat16"},
    "sharded": {"strategy.kind": "fsdp", "resources.workers": 2},
    "replicas": {"strategy.kind": "fsdp", "strategy.replicas": 2, "resources.workers": 4},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_parameters_are_those_of_the_model_up_to_norms_and_biases(shape: str, tmp_path: Path) -> None:
    recipe = plan_recipe(tmp_path, SHAPES[shape])
    found, plan = first_estimate(recipe, SHAPES[shape], 1), planned(recipe)
    assert found is not None
    base = plan.total_parameters - plan.trainable_parameters
    assert found.parameters == pytest.approx(base, rel=0.01)
    assert found.trained == plan.trainable_parameters
    [line] = [line for line in first_lines(recipe, None) if line.startswith("  trained")]
    share = float(line.partition("(")[2].removesuffix("%)")) / 100
    assert share == pytest.approx(plan.trainable_parameters / plan.total_parameters, rel=0.01), "the plan's own share"


@pytest.mark.parametrize("change", CHANGES)
def test_the_bytes_are_those_of_the_plan(change: str, tmp_path: Path) -> None:
    recipe = plan_recipe(tmp_path, WIDE, **CHANGES[change])
    ranks = recipe.resources.min_workers
    found, plan = first_estimate(recipe, WIDE, ranks), planned(recipe, ranks)
    assert found is not None
    assert found.training_bytes is not None
    rank = plan.largest
    assert found.weight_bytes == pytest.approx(rank.frozen_bytes + rank.quant_state_bytes, rel=0.02)
    kept = rank.trainable_bytes + rank.gradient_bytes + rank.optimizer_bytes
    assert found.training_bytes == pytest.approx(kept, rel=0.01)
    assert found.trained == pytest.approx(plan.trainable_parameters, rel=0.01)


def test_what_does_not_follow_from_the_numbers_is_left_out(tmp_path: Path) -> None:
    assert first_estimate(plan_recipe(tmp_path, WIDE), {**WIDE, "kv_lora_rank": 16}, 1) is None
    assert first_estimate(plan_recipe(tmp_path, WIDE), {"model_type": "mamba", "hidden_size": 64}, 1) is None
    pattern = first_estimate(plan_recipe(tmp_path, WIDE, **{"adapter.target_modules": ".*q_proj"}), WIDE, 1)
    assert pattern is not None
    assert (pattern.trained, pattern.training_bytes, pattern.bytes) == (None, None, pattern.weight_bytes)
    inner = first_estimate(plan_recipe(tmp_path, WIDE), {"text_config": WIDE, "vision_config": {}}, 1)
    assert inner == first_estimate(plan_recipe(tmp_path, WIDE), WIDE, 1)


def test_where_the_numbers_are_read(tmp_path: Path) -> None:
    assert read_numbers(str(config_folder(tmp_path / "base", WIDE))) == WIDE
    assert (read_numbers("s3://models/Llama-3.1-8B") or {})["num_hidden_layers"] == 32
    assert read_numbers("s3://models/of-ours") is None
    assert read_numbers("nobody/has-this-model") is None
    assert read_numbers("./nowhere") is None
    (tmp_path / "base" / "config.json").write_text("{")
    assert read_numbers(str(tmp_path / "base")) is None


def test_a_long_path_is_not_broken(tmp_path: Path) -> None:
    path = f"s3://models/{'a-long-name-' * 9}of-a-model"
    lines = list(first_lines(plan_recipe(tmp_path, WIDE, **{"model.path": path}), None))
    assert any(path in line for line in lines)
    assert "its config.json is not on this machine" in " ".join(line.strip() for line in lines)


FIRST = """
import sys
from launcher.cli.app import app
from launcher.plan.table import first_lines
from trainer.recipe import load
print("\\n".join(first_lines(load(sys.argv[1]), 24 * 2**30)))
heavy = {"torch", "transformers", "peft", "ray", "numpy", "accelerate"} & sys.modules.keys()
assert not heavy, heavy
"""


def test_the_first_answer_imports_no_heavy_library(tmp_path: Path) -> None:
    changes = {"model.quantization": "nf4", "model.dtype": "bfloat16", "resources.gpus_per_worker": 1}
    path = tmp_path / "recipe.yaml"
    path.write_text(dump(plan_recipe(tmp_path, LLAMA_70B, **changes)))
    done = subprocess.run(
        [sys.executable, "-c", FIRST, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "estimate from config.json, for 1 rank, without activations:"
    assert [line.split()[-2:] for line in lines if "parameters" in line] == [["70.6", "B"]]
    assert lines[-1] == "  does NOT fit into 24.00 GiB"
    assert json.loads(Path(tmp_path / "base" / "config.json").read_text()) == LLAMA_70B
