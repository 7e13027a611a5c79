"""Models that keep the samples of a pack apart pass; those that do not are refused before a step is trained."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    Gemma2Config,
    GPT2Config,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    RobertaConfig,
    XLNetConfig,
)

from trainer.errors import InputError
from trainer.model.kernels.packing_check import check_isolation, check_left_to_right
from trainer.tasks.inputs import model_inputs

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 96}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}


def check(model: torch.nn.Module, sequence_length: int = 64) -> None:
    check_isolation(model, model, model_inputs, torch.device("cpu"), "base", sequence_length)


def model_of(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(5)
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


DECODERS = [
    LlamaConfig(**SIZES, **HEADS),
    Qwen2Config(**SIZES, **HEADS),
    Gemma2Config(**SIZES, **HEADS, head_dim=16),
    GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=96),
    MixtralConfig(**SIZES, **HEADS, sliding_window=32),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", DECODERS, ids=lambda c: c.model_type)
def test_attention_keeps_samples_apart(config: PreTrainedConfig, dtype: torch.dtype) -> None:
    check(model_of(config, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [*DECODERS, MambaConfig(**SIZES, state_size=8)], ids=lambda c: c.model_type)
def test_a_decoder_reads_from_left_to_right(config: PreTrainedConfig, dtype: torch.dtype) -> None:
    model = model_of(config, dtype)
    check_left_to_right(model, model, model_inputs, torch.device("cpu"), "base", 64)


WIDE = {"initializer_range": 0.3}  # layers then move logits as much as those of a trained model


@pytest.mark.parametrize(
    ("config", "dtype", "why"),
    [
        (BertConfig(**SIZES, **HEADS), torch.float32, "BertLMHeadModel lets a token see what follows it"),
        (BertConfig(**SIZES, **HEADS, **WIDE), torch.bfloat16, "BertLMHeadModel lets a token see what follows it"),
        (XLNetConfig(d_model=32, n_layer=2, n_head=2, d_inner=64, vocab_size=96), torch.float32, "XLNetLMHeadModel"),
        (RobertaConfig(**SIZES, **HEADS, is_decoder=True), torch.bfloat16, "RobertaForCausalLM does not number"),
    ],
    ids=lambda c: getattr(c, "model_type", ""),
)
def test_an_encoder_is_refused(config: PreTrainedConfig, dtype: torch.dtype, why: str) -> None:
    model = model_of(config, dtype)
    with pytest.raises(InputError, match=f"'base': {why}"):
        check_left_to_right(model, model, model_inputs, torch.device("cpu"), "base", 64)


@pytest.mark.parametrize("int8", [False, True])
def test_recurrent_state_is_refused(int8: bool) -> None:
    model = model_of(MambaConfig(**SIZES, state_size=8))
    model.is_loaded_in_8bit = int8
    with pytest.raises(
        InputError, match=r"'base'.*MambaForCausalLM lets the samples of a pack see each other.*packing=false"
    ):
        check(model)


def test_the_model_is_left_as_it_was() -> None:
    model = model_of(LlamaConfig(**SIZES, **HEADS)).train()
    check(model)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


LLAMA4 = {
    **{**SIZES, **HEADS, "intermediate_size_mlp": 64, "num_local_experts": 2, "head_dim": 16, "num_hidden_layers": 4},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        ({"floor_scale": 8192, "attention_chunk_size": 8192}, None),
        ({"floor_scale": 32, "attn_temperature_tuning": False, "attention_chunk_size": 8192}, None),
        ({"floor_scale": 32, "attention_chunk_size": 8192}, 32),
        ({"floor_scale": 32, "attention_chunk_size": 24}, 32),  # transformers counts chunks from each sample
    ],
)
def test_a_temperature_that_counts_from_the_beginning_of_a_pack(
    settings: dict[str, int], refused: int | None, dtype: torch.dtype
) -> None:
    model = model_of(Llama4TextConfig(**LLAMA4, **settings, initializer_range=0.08), dtype)
    before = [dict(vars(module)) for module in model.modules()]
    if refused is None:
        check(model)
    else:
        asks = r"counts floor_scale 32 from .* is 64; lower it to 32, or set data\.packing=false"
        with pytest.raises(InputError, match=asks):
            check(model)
        check(model, refused)
    assert [dict(vars(module)) for module in model.modules()] == before


def test_positions_that_do_not_restart_are_refused() -> None:
    """Whatever the tokens before a sample, it is treated alike; and yet it is not as it is alone."""
    model = model_of(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=96))
    learned = model.transformer.wpe.forward
    model.transformer.wpe.forward = lambda ids: learned(torch.arange(ids.shape[-1])[None])
    with pytest.raises(InputError, match=r"GPT2LMHeadModel treats a sample by its place in the pack"):
        check(model)
