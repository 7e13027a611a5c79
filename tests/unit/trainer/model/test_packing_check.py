"""Models that keep the samples of a pack apart pass; those that do not are refused before a step is trained."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from trainer.errors import InputError
from trainer.model.kernels.packing_check import check_isolation

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 96}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}


def model_of(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(5)
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES, **HEADS),
        Qwen2Config(**SIZES, **HEADS),
        Gemma2Config(**SIZES, **HEADS, head_dim=16),
        GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=96),
    ],
    ids=lambda c: c.model_type,
)
def test_attention_keeps_samples_apart(config: PreTrainedConfig, dtype: torch.dtype) -> None:
    check_isolation(model_of(config, dtype), "base")


@pytest.mark.parametrize("int8", [False, True])
def test_recurrent_state_is_refused(int8: bool) -> None:
    model = model_of(MambaConfig(**SIZES, state_size=8))
    model.is_loaded_in_8bit = int8
    with pytest.raises(
        InputError, match=r"'base'.*MambaForCausalLM lets the samples of a pack see each other.*packing=false"
    ):
        check_isolation(model, "base")


def test_the_model_is_left_as_it_was() -> None:
    model = model_of(LlamaConfig(**SIZES, **HEADS)).train()
    check_isolation(model, "base")
    assert model.training
    assert all(p.grad is None for p in model.parameters())
