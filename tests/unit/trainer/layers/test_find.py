"""The decoder layers are nearly all of a model's body, whatever classes they have and whatever stands beside them."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig

from tests.support.models import SHARED_BLOCKS
from trainer.errors import InputError
from trainer.layers.find import decoder_layers, separate_blocks

SIZES = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2},
    **{"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
ZAMBA2 = transformers.Zamba2Config(
    **SIZES,
    **SHARED_BLOCKS,
)
GEMMA3 = transformers.Gemma3Config(
    text_config={**SIZES, "num_hidden_layers": 3, "head_dim": 16},
    vision_config={"hidden_size": 64, "num_hidden_layers": 8, "num_attention_heads": 2, "intermediate_size": 256},
)


def on_meta(config: PreTrainedConfig) -> torch.nn.Module:
    with torch.device("meta"):
        model: torch.nn.Module = AutoModelForCausalLM.from_config(config)
    return model


def elements(modules: Iterable[torch.nn.Module]) -> int:
    return sum({id(p): p.numel() for m in modules for p in m.parameters()}.values())


@pytest.mark.parametrize(
    ("config", "classes", "count"),
    [
        (transformers.LlamaConfig(**SIZES, num_hidden_layers=3), {"LlamaDecoderLayer"}, 3),
        (
            transformers.JambaConfig(**SIZES, num_hidden_layers=8),
            {"JambaAttentionDecoderLayer", "JambaMambaDecoderLayer"},
            8,
        ),
        (
            transformers.OlmoHybridConfig(**SIZES, num_hidden_layers=4),
            {"OlmoHybridAttentionDecoderLayer", "OlmoHybridLinearAttentionDecoderLayer"},
            4,
        ),
        (transformers.HrmTextConfig(**SIZES, num_layers_per_stack=2), {"HrmTextDecoderLayer"}, 4),
        (ZAMBA2, {"Zamba2HybridLayer", "Zamba2MambaDecoderLayer"}, 6),
        (
            transformers.MllamaConfig(text_config={**SIZES, "num_hidden_layers": 4, "cross_attention_layers": [1]}),
            {"MllamaCrossAttentionDecoderLayer", "MllamaSelfAttentionDecoderLayer"},
            4,
        ),
    ],
    ids=lambda c: getattr(c, "model_type", ""),
)
def test_layers_of_several_classes_are_taken(config: PreTrainedConfig, classes: set[str], count: int) -> None:
    model = on_meta(config)
    layers = decoder_layers(model)
    assert {type(layer).__name__ for layer in layers} == classes
    assert len(layers) == count
    outside = {
        id(p): p.numel() for m in (model.get_input_embeddings(), model.get_output_embeddings()) for p in m.parameters()
    }
    assert elements(layers) > 0.98 * (elements([model]) - sum(outside.values()))


def test_a_larger_vision_tower_has_no_decoder_layers_but_is_sharded() -> None:
    model = on_meta(GEMMA3)
    assert {type(layer).__name__ for layer in decoder_layers(model)} == {"Gemma3DecoderLayer"}
    assert [type(block).__name__ for block in separate_blocks(model)] == 3 * ["Gemma3DecoderLayer"] + 8 * [
        "SiglipEncoderLayer"
    ]


def test_blocks_that_several_layers_use_are_no_part_of_a_block() -> None:
    model = on_meta(ZAMBA2)
    shared = model.model.layers[1].shared_transformer.self_attn.q_proj.weight
    assert shared is model.model.layers[4].shared_transformer.self_attn.q_proj.weight
    blocks = separate_blocks(model)
    assert len(blocks) == 2 + 2 * 4  # two layers of one kind; of the others the linear layer and the mixer
    assert all(shared is not p for block in blocks for p in block.parameters())
    assert elements(blocks) + elements(
        m.shared_transformer for m in model.modules() if hasattr(m, "shared_transformer")
    ) == elements(decoder_layers(model))


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(InputError, match=r"no list of decoder layers in Linear.*strategy\.kind=ddp"):
        decoder_layers(torch.nn.Linear(2, 2))
