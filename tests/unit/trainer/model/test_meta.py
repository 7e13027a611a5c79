"""The model on the meta device is, but for its weights, the model that loading gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.models import CPU, base_of
from tests.support.training import small_recipe
from trainer.errors import InputError
from trainer.model.meta import NeedsFullLoad, four_bit_layers, meta_model
from trainer.recipe import Recipe

Make = Callable[..., Recipe]


@pytest.fixture
def make(tiny_model: Path, tmp_path: Path) -> Make:
    return lambda **changes: small_recipe("meta", tiny_model, tmp_path, **changes)


def meta_of(recipe: Recipe) -> Any:
    return meta_model(recipe.model, Path(recipe.model.path), CPU, full=False, checkpointing=False)


def described(model: torch.nn.Module) -> dict[str, Any]:
    return {n: (tuple(p.shape), p.dtype, type(p), p.requires_grad) for n, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_it_is_the_loaded_model_without_weights(make: Make, quantization: str, dtype: str) -> None:
    recipe = make(**{"model.quantization": quantization, "model.dtype": dtype})
    meta, loaded = meta_of(recipe), base_of(recipe)
    assert described(meta) == described(loaded)
    assert all(p.is_meta for p in meta.parameters())
    assert {n: type(m) for n, m in meta.named_modules()} == {n: type(m) for n, m in loaded.named_modules()}
    assert meta.config.to_dict() == loaded.config.to_dict()
    assert meta.training is loaded.training


def test_computed_buffers_are_those_of_the_loaded_model(make: Make) -> None:
    want = dict(base_of(make()).named_buffers())
    got = dict(meta_of(make()).named_buffers())
    assert list(got) == list(want)
    assert "model.rotary_emb.inv_freq" in got
    for name, buffer in want.items():
        assert torch.equal(got[name], buffer), name


def test_the_quantisation_state_has_the_loaded_ones_shapes(make: Make) -> None:
    recipe = make(**{"model.quantization": "nf4"})
    loaded = four_bit_layers(base_of(recipe))
    for name, layer in four_bit_layers(meta_of(recipe)).items():
        got, want = layer.weight.quant_state, loaded[name].weight.quant_state
        assert layer.quant_state is got
        assert layer.support_avx512bf16_for_cpu is False
        assert (got.shape, got.dtype, got.blocksize, got.quant_type) == (want.shape, want.dtype, 64, "nf4")
        for a, b in ((got.absmax, want.absmax), (got.state2.absmax, want.state2.absmax), (got.offset, want.offset)):
            assert a.is_meta
            assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_quantising_on_the_meta_device_leaves_real_tensors_quantisable(make: Make) -> None:
    from bitsandbytes import functional

    functional.name2qmap.pop("dynamic", None)
    recipe = make(**{"model.quantization": "nf4"})
    meta_of(recipe)
    assert not functional.name2qmap["dynamic"].is_meta
    base_of(recipe)


def test_tied_embeddings_stay_one_parameter(make: Make, tmp_path: Path) -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path / "tied")
    model = meta_of(make(**{"model.path": str(tmp_path / "tied")}))
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("family", ["GPT2", "Gemma3Text", "Qwen3Moe"])
def test_other_families(make: Make, tmp_path: Path, family: str) -> None:
    """Boolean masks, scales of embeddings, fused experts: buffers and parameters as loading gives them."""
    import transformers

    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "num_experts": 4}
    config = getattr(transformers, f"{family}Config")(
        **({"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 64} if family == "GPT2" else {**sizes, **heads})
    )
    folder = tmp_path / family
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    recipe = make(**{"model.path": str(folder)})
    meta, loaded = meta_of(recipe), base_of(recipe)
    assert described(meta) == described(loaded)
    for name, buffer in loaded.named_buffers():
        assert torch.equal(meta.get_buffer(name), buffer), name


def test_a_buffer_that_the_model_does_not_compute_is_said(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForCausalLM, LlamaModel

    for model in (LlamaForCausalLM, LlamaModel):
        monkeypatch.setattr(model, "_init_weights", lambda self, module: None)
    with pytest.raises(NeedsFullLoad, match=r"model\.rotary_emb\.\w*inv_freq"):
        meta_of(make())


def test_an_unknown_architecture_is_the_users_to_mend(make: Make, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(InputError, match=r"config.json that cannot be used: .*no-such-model"):
        meta_of(make(**{"model.path": str(tmp_path / "other")}))
