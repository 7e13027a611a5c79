"""Which bases are taken: one decision for every command, and one sentence for those that are not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.driver.preflight import _model_without_weights
from tests.support.quantised import with_settings
from trainer.artifacts.inspect import describe
from trainer.artifacts.locate import ArtifactRef
from trainer.artifacts.merge import merge
from trainer.errors import InputError
from trainer.model import build
from trainer.model.meta import meta_model
from trainer.model.placement import model_bytes
from trainer.plan.config import read_base
from trainer.recipe import ModelSection
from trainer.recipe.tasks import CAUSAL, SEQUENCE

CPU = torch.device("cpu")
Way = Callable[[ModelSection, Path], Any]
WAYS: dict[str, Way] = {
    "the driver": lambda section, folder: _model_without_weights(section, folder, CAUSAL),
    "a plan": lambda section, folder: read_base(section, CAUSAL),
    "a rank": lambda section, folder: build(section, folder, CPU, full=False, checkpointing=False),
    "a rank by shard": lambda section, folder: meta_model(section, folder, CPU, full=False, checkpointing=False),
}
EVERY: dict[str, Way] = {**WAYS, "generate and evaluate": model_bytes}

BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}
GOOD_INT8 = {**BNB, "load_in_4bit": False, "load_in_8bit": True}


@pytest.mark.parametrize("way", EVERY)
@pytest.mark.parametrize(
    ("stored", "asked", "says"),
    [
        ({"quant_method": "gptq", "bits": 4}, "nf4", r"quantised by 'gptq', which muster does not train: name the unq"),
        ({"quant_method": "awq"}, "none", r"quantised by 'awq', which .* model\.quantization: nf4"),
        ({"quant_method": "of tomorrow"}, "none", r"quantised by 'of tomorrow'"),
        ({}, "none", r"have a quantization_config without a method"),
        ({**BNB, "bnb_4bit_quant_type": "nf4"}, "none", r"packed as nf4, .* is none: set model\.quantization: nf4 "),
        ({**BNB, "bnb_4bit_quant_type": "nf4"}, "int8", r"packed as nf4, .* is int8: set model\.quantization: nf4 "),
        ({**BNB, "bnb_4bit_quant_type": "fp4"}, "nf4", r"packed as fp4, which muster does not train: name the unq"),
        (GOOD_INT8, "nf4", r"packed as int8, .* is nf4: set model\.quantization: int8 "),
        ({"quant_method": "fp8", "scale_fmt": "ue8m0"}, "nf4", r"by 'fp8' with scale_fmt 'ue8m0'"),
        ({"quant_method": "fp8", "expert_dtype": "fp4"}, "nf4", r"by 'fp8' with expert_dtype 'fp4'"),
    ],
)
def test_a_quantisation_that_is_not_trained(
    way: str, stored: dict[str, Any], asked: Any, says: str, tiny_model: Path, tmp_path: Path
) -> None:
    folder = with_settings(tiny_model, tmp_path / "base", stored)
    with pytest.raises(InputError, match=says) as caught:
        EVERY[way](ModelSection(path=str(folder), quantization=asked), folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
def test_the_plan_of_stored_weights_that_are_dequantised(method: str, tiny_model: Path, tmp_path: Path) -> None:
    from tests.support.training import small_recipe
    from trainer.plan.memory import Planner
    from trainer.plan.result import Limits

    plans = []
    for settings in ({"quant_method": method}, None):
        folder = with_settings(tiny_model, tmp_path / f"base-{settings is None}", settings)
        changes = {"model.quantization": "nf4", "model.dtype": "bfloat16"}
        recipe = small_recipe("plan", folder, tmp_path, **changes)
        plans.append(Planner(read_base(recipe.model).config, Limits()).plan(recipe, 2))
    assert plans[0] == plans[1]


def small(kind: str) -> dict[str, Any]:
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    if kind in ("t5", "bart"):
        return {"d_model": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2, "d_ff": 16, "vocab_size": 384}
    return {"text_config": size, "vision_config": size} if kind in ("llava", "qwen2_5_vl") else size


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("t5", "holds a 't5' model, which is no causal language model but an encoder with a decoder: name"),
        ("bart", "holds a 'bart' model, which is no causal language model but an encoder with a decoder: name"),
        ("llava", r"holds a 'llava' model \(SomeClass\), which is no causal language model: name one of a family"),
        ("qwen2_5_vl", r"holds a 'qwen2_5_vl' model \(SomeClass\), which is no causal language model: name one of"),
        ("vit", r"holds a 'vit' model \(SomeClass\), which is no causal language model"),
        ("bert", "holds a 'bert' model, which is no causal language model but an encoder, whose tokens see those"),
    ],
)
def test_a_class_that_is_no_causal_language_model(
    way: str, kind: str, says: str, tiny_model: Path, tmp_path: Path
) -> None:
    folder = with_settings(tiny_model, tmp_path / "base", None)
    (folder / "config.json").write_text(json.dumps({"model_type": kind, "architectures": ["SomeClass"], **small(kind)}))
    with pytest.raises(InputError, match=says) as caught:
        WAYS[way](ModelSection(path=str(folder)), folder)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def test_an_encoder_with_a_decoder_is_no_classifier(tiny_model: Path, tmp_path: Path) -> None:
    folder = with_settings(tiny_model, tmp_path / "base", None)
    (folder / "config.json").write_text(json.dumps({"model_type": "t5", **small("t5")}))
    with pytest.raises(InputError, match="no model for sequence classification but an encoder with a decoder"):
        read_base(ModelSection(path=str(folder)), SEQUENCE)


@pytest.mark.parametrize("way", EVERY)
def test_a_strict_configuration_keeps_its_reason(way: str, tiny_model: Path, tmp_path: Path) -> None:
    folder = with_settings(tiny_model, tmp_path / "base", None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": "many"}))
    with pytest.raises(InputError, match=r"'num_hidden_layers'.*(int|many)") as caught:
        EVERY[way](ModelSection(path=str(folder)), folder)
    assert "\n" not in str(caught.value)


def test_an_adapter_on_packed_files_is_not_merged(tiny_model: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings: Any = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base: Any = AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=settings)
    base.save_pretrained(tmp_path / "base")
    model: Any = get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "muster.json").write_text(
        json.dumps({"task": "sft", "method": "lora", "model": {"path": str(tmp_path / "base"), "quantization": "nf4"}})
    )
    with pytest.raises(InputError, match=r"the base's files are quantised: name an unquantised base"):
        merge(ArtifactRef(adapters=(("default", str(tmp_path / "adapter")),)), tmp_path / "merged")
    assert describe(str(tmp_path / "adapter")).problems == []
