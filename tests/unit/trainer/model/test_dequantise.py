"""Bases in fp8 and mxfp4: the weights that they stand for, loaded whole, by runs of elements, and as an NF4 copy."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.models import CPU, logits_of
from tests.support.quantised import in_fp8, in_mxfp4
from trainer.errors import InputError
from trainer.model import build
from trainer.model.dequantise import QuantisedLocation, WeightReader, locate_weights
from trainer.model.files.safetensors_index import read_headers
from trainer.model.files.weight_source import WeightSource
from trainer.model.placement import Placement
from trainer.model.prequantised import make_copy
from trainer.recipe import ModelSection
from trainer.storage import open_storage


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        vocab_size=384, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=3, num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("gpt-oss")
    GptOssForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def deepseek(tmp_path: Path) -> Path:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        vocab_size=384, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, first_k_dense_replace=1, kv_lora_rank=16, q_lora_rank=24, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=16, n_shared_experts=1,
    )  # fmt: skip
    torch.manual_seed(0)
    DeepseekV3ForCausalLM(config).save_pretrained(tmp_path / "deepseek")
    return tmp_path / "deepseek"


def same(stored: Path, plain: Path, **section: Any) -> None:
    got, want = (
        build(ModelSection(path=str(f), **section), f, CPU, full=False, checkpointing=False).model
        for f in (stored, plain)
    )
    expected = dict(want.named_parameters())
    for name, parameter in got.named_parameters():
        other = expected.pop(name)
        assert parameter.dtype == other.dtype, name
        assert torch.equal(parameter.view(-1).view(torch.uint8), other.view(-1).view(torch.uint8)), name
    assert not expected
    assert torch.equal(logits_of(got), logits_of(want))
    assert got.name_or_path == str(stored)
    assert ("quantization_config" in got.config.to_dict()) == (section.get("quantization", "none") != "none")


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fp8_loads_as_the_weights_that_it_stands_for(
    quantization: str, dtype: str, tiny_model: Path, tmp_path: Path
) -> None:
    same(*in_fp8(tiny_model, tmp_path), quantization=quantization, dtype=dtype)


def test_fp8_experts_are_fused_as_those_of_the_unquantised_base(deepseek: Path, tmp_path: Path) -> None:
    same(*in_fp8(deepseek, tmp_path), dtype="bfloat16")


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.filterwarnings("ignore:.*RoPE")
def test_mxfp4_loads_as_the_weights_that_it_stands_for(quantization: str, gpt_oss: Path, tmp_path: Path) -> None:
    same(*in_mxfp4(gpt_oss, tmp_path), quantization=quantization, dtype="bfloat16")


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_any_run_of_elements_is_read(kind: str, tiny_model: Path, gpt_oss: Path, tmp_path: Path) -> None:
    stored, plain = in_fp8(tiny_model, tmp_path) if kind == "fp8" else in_mxfp4(gpt_oss, tmp_path)
    want = load_file(plain / "model.safetensors")
    settings = {"quant_method": kind, "weight_block_size": [48, 40]}
    with closing(WeightSource(str(stored))) as source:
        places, reader = locate_weights(read_headers(source, "base"), settings, "base"), WeightReader(source)
        assert places.keys() == want.keys()
        quantised = {name: place for name, place in places.items() if isinstance(place, QuantisedLocation)}
        assert quantised
        for name, place in quantised.items():
            assert place.shape == tuple(want[name].shape)
            for start, stop in ((0, 1), (7, 7), (11, 131), (place.unit - 1, place.unit + 1), (5, place.numel)):
                assert torch.equal(reader.values(place, start, stop), want[name].view(-1)[start:stop]), name


def test_an_expert_is_read_once_by_consecutive_runs(gpt_oss: Path, tmp_path: Path) -> None:
    stored, _ = in_mxfp4(gpt_oss, tmp_path)
    with closing(WeightSource(str(stored))) as source:
        places = locate_weights(read_headers(source, "base"), {"quant_method": "mxfp4"}, "base")
        place = next(place for place in places.values() if isinstance(place, QuantisedLocation))
        held = sum((last - first) for _, first, last in place.stored(*place.units(0, place.numel)))
        reader, before = WeightReader(source), source.bytes_read
        for start in range(0, place.numel, 1000):
            reader.values(place, start, min(place.numel, start + 1000))
        assert source.bytes_read - before == held


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_its_nf4_copy_is_that_of_the_weights(kind: str, tiny_model: Path, gpt_oss: Path, tmp_path: Path) -> None:
    folders = in_fp8(tiny_model, tmp_path) if kind == "fp8" else in_mxfp4(gpt_oss, tmp_path)
    files = []
    for folder in folders:
        copy = make_copy(ModelSection(path=str(folder), quantization="nf4"), open_storage(str(tmp_path / "models")))
        files.append(load_file(next(Path(copy.url).glob("*.safetensors"))))
    got, want = files
    assert got.keys() == want.keys()
    for name, tensor in got.items():
        assert torch.equal(tensor.view(-1).view(torch.uint8), want[name].view(-1).view(torch.uint8)), name


def test_a_weight_without_its_scales_is_a_sentence(tiny_model: Path, gpt_oss: Path, tmp_path: Path) -> None:
    for make, source, lacking in ((in_fp8, tiny_model, "q_proj.weight_scale_inv"), (in_mxfp4, gpt_oss, "_proj_scales")):
        folder, _ = make(source, tmp_path / lacking)
        kept = {n: t for n, t in load_file(folder / "model.safetensors").items() if not n.endswith(lacking)}
        save_file(kept, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(InputError, match="without"):
            build(ModelSection(path=str(folder)), folder, CPU, full=False, checkpointing=False)


def test_it_is_not_read_from_the_disk_at_each_forward(tiny_model: Path, tmp_path: Path) -> None:
    import transformers

    from trainer.model.offload import spread

    folder, _ = in_fp8(tiny_model, tmp_path)
    placement = Placement(CPU, {"cpu": 100_000}, str(tmp_path / "disk"))
    with pytest.raises(InputError, match="does not fit in memory once its weights are dequantised"):
        spread(ModelSection(path=str(folder)), folder, placement, lambda base: base, transformers.AutoModelForCausalLM)
