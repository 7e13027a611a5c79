"""The NF4 copy of a base: written once, in the form that transformers loads, under a digest of what decides it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.models import base_of, logits_of
from tests.support.training import small_recipe
from trainer.errors import InputError
from trainer.model import prequantised
from trainer.model.meta import four_bit_layers
from trainer.model.prequantised import copy_of, make_copy
from trainer.recipe import Recipe
from trainer.run.shared import CONDEMNED, USED
from trainer.storage import Storage, open_storage

Make = Callable[..., Recipe]


@pytest.fixture
def make(tiny_model: Path, tmp_path: Path) -> Make:
    return lambda **changes: small_recipe("copy", tiny_model, tmp_path, **{"model.quantization": "nf4", **changes})


@pytest.fixture
def models(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "models"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_loads_what_quantising_the_base_gives(
    make: Make, models: Storage, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(prequantised, "FILE_BYTES", 40_000)  # several files
    recipe = make(**{"model.dtype": dtype})
    copy = make_copy(recipe.model, models)
    assert len(list(Path(copy.url).glob("*.safetensors"))) > 1
    loaded: Any = AutoModelForCausalLM.from_pretrained(copy.url)
    for layer in four_bit_layers(loaded).values():
        layer.support_avx512bf16_for_cpu = False
    want = base_of(recipe)
    assert {n: (p.dtype, p.shape) for n, p in loaded.named_parameters()} == {
        n: (p.dtype, p.shape) for n, p in want.named_parameters()
    }
    for name, parameter in want.named_parameters():
        got = loaded.get_parameter(name)
        assert torch.equal(got.data.view(-1).view(torch.uint8), parameter.data.view(-1).view(torch.uint8)), name
    for name, layer in four_bit_layers(want).items():
        a, b = loaded.get_submodule(name).weight.quant_state, layer.weight.quant_state
        assert torch.equal(a.absmax, b.absmax)
        assert torch.equal(a.state2.absmax, b.state2.absmax)
        assert torch.equal(a.offset, b.offset)
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert torch.equal(logits_of(loaded), logits_of(want))


def test_it_is_small_and_has_the_tokenizer(make: Make, models: Storage, tiny_model: Path) -> None:
    recipe = make(**{"model.dtype": "bfloat16"})
    copy = make_copy(recipe.model, models)
    files = {f.name for f in Path(copy.url).iterdir()}
    assert {f.name for f in tiny_model.iterdir() if f.suffix != ".safetensors"} <= files
    linear = sum(layer.weight.numel() * 2 for layer in four_bit_layers(base_of(recipe)).values())
    original = sum(t.numel() for t in load_file(tiny_model / "model.safetensors").values()) * 2
    size = sum(f.stat().st_size for f in Path(copy.url).glob("*.safetensors"))
    assert size < original - 2 * linear, "at most half of the linear layers' bytes are left"
    config = json.loads((Path(copy.url) / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"


def times(copy: Storage) -> dict[str, int]:
    """When each file was written, but for the one that says when the copy was last used."""
    return {f.name: f.stat().st_mtime_ns for f in Path(copy.url).iterdir() if f.name != USED}


def test_it_is_made_once_and_found_again(make: Make, models: Storage) -> None:
    recipe = make()
    assert copy_of(recipe.model, models) is None
    copy = make_copy(recipe.model, models)
    written = times(copy)
    assert make_copy(recipe.model, models).url == copy.url
    assert times(copy) == written
    found = copy_of(recipe.model, models)
    assert found
    assert found.url == copy.url


def test_a_copy_that_gc_deletes_is_not_used(make: Make, models: Storage) -> None:
    copy = make_copy(make().model, models)
    copy.write_json(CONDEMNED, {})
    assert copy_of(make().model, models) is None, "the base model itself is loaded"
    with pytest.raises(InputError, match="`muster gc` is deleting"):
        make_copy(make().model, models)
    copy.delete([CONDEMNED])
    assert copy_of(make().model, models)


def test_half_a_copy_is_none(make: Make, models: Storage) -> None:
    copy = make_copy(make().model, models)
    copy.delete(["config.json"])
    assert copy_of(make().model, models) is None
    make_copy(make().model, models)
    assert copy_of(make().model, models)


def test_another_base_or_type_is_another_copy(make: Make, models: Storage, tiny_model: Path, tmp_path: Path) -> None:
    make_copy(make().model, models)
    assert copy_of(make(**{"model.dtype": "bfloat16"}).model, models) is None
    same = tmp_path / "same"
    shutil.copytree(tiny_model, same)
    section = make(**{"model.path": str(same)}).model
    assert copy_of(section, models), "the same bytes in another folder"
    tensors = load_file(same / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] += 0.001
    save_file(tensors, same / "model.safetensors", {"format": "pt"})
    assert copy_of(section, models) is None


def test_a_base_in_object_storage_is_known_by_its_etags(
    make: Make, models: Storage, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MUSTER_CACHE", str(tmp_path / "cache"))
    url = f"memory://base-{tmp_path.name}"
    storage = open_storage(url)
    for file in tiny_model.iterdir():
        storage.write(file.name, file.read_bytes())
    section = make(**{"model.path": url}).model
    make_copy(section, models)
    assert copy_of(section, models)
    raw = (tiny_model / "model.safetensors").read_bytes()
    storage.write("model.safetensors", raw[:-4] + b"\0\0\0\1")
    assert copy_of(section, models) is None


def test_a_base_that_is_converted_while_it_is_loaded_is_told(make: Make, models: Storage, tmp_path: Path) -> None:
    from transformers import OlmoHybridConfig, OlmoHybridForCausalLM

    config = OlmoHybridConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=16,
        linear_value_head_dim=16, layer_types=["linear_attention", "full_attention"], pad_token_id=0,
    )  # fmt: skip
    OlmoHybridForCausalLM(config).save_pretrained(tmp_path / "converted")
    with pytest.raises(InputError, match=r"no NF4 copy of .* can be made: transformers converts"):
        make_copy(make(**{"model.path": str(tmp_path / "converted")}).model, models)
