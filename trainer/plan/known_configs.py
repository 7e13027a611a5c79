"""Shapes of well-known base models, for a plan when their own ``config.json`` cannot be read (gated, or no network).

A model is recognised by the last part of its path, so that a copy in a bucket is found too. The plan has a note then.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LLAMA_3 = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072}
_QWEN_2_5 = {"model_type": "qwen2", "max_position_embeddings": 32768}

LLAMA_3_8B = _LLAMA_3 | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
LLAMA_3_70B = _LLAMA_3 | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
MISTRAL_7B = {
    "model_type": "mistral",
    "vocab_size": 32768,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "sliding_window": None,
}
QWEN_2_5_HALF_B = _QWEN_2_5 | {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
QWEN_2_5_1_5B = _QWEN_2_5 | {
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
QWEN_2_5_7B = _QWEN_2_5 | {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}

QWEN_2_5_14B = _QWEN_2_5 | {
    "vocab_size": 152064,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
MODERNBERT_BASE = {
    "model_type": "modernbert",
    "vocab_size": 50368,
    "hidden_size": 768,
    "intermediate_size": 1152,
    "num_hidden_layers": 22,
    "num_attention_heads": 12,
}

_QWEN_3 = {"vocab_size": 151936, "head_dim": 128, "max_position_embeddings": 40960}
QWEN_3_0_6B = _QWEN_3 | {
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
QWEN_3_8B = _QWEN_3 | {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
QWEN_3_30B_A3B = _QWEN_3 | {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "tie_word_embeddings": False,
}
LLAMA_3_2_1B = _LLAMA_3 | {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "tie_word_embeddings": True,
}
LLAMA_3_2_3B = _LLAMA_3 | {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "tie_word_embeddings": True,
}
GEMMA_3_1B = {
    "model_type": "gemma3_text",
    "vocab_size": 262144,
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "num_hidden_layers": 26,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "sliding_window": 512,
    "max_position_embeddings": 32768,
}
_GEMMA_3_VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 896,
    "patch_size": 14,
    "vision_use_head": False,
}
GEMMA_3_4B = {
    "model_type": "gemma3",
    "text_config": {
        "model_type": "gemma3_text",
        "vocab_size": 262208,
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 1024,
        "max_position_embeddings": 131072,
    },
    "vision_config": _GEMMA_3_VISION,
}
GPT_OSS_20B = {
    "model_type": "gpt_oss",
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 24,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
    "max_position_embeddings": 131072,
}
MISTRAL_SMALL_24B = {
    "model_type": "mistral",
    "vocab_size": 131072,
    "hidden_size": 5120,
    "intermediate_size": 32768,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "sliding_window": None,
}
SMOLLM3_3B = {
    "model_type": "smollm3",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 65536,
    "tie_word_embeddings": True,
}
PHI_4 = {
    "model_type": "phi3",
    "vocab_size": 100352,
    "hidden_size": 5120,
    "intermediate_size": 17920,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 10,
    "max_position_embeddings": 16384,
    "tie_word_embeddings": False,
}
PHI_4_MINI = {
    "model_type": "phi3",
    "vocab_size": 200064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}

SHAPES: dict[str, Mapping[str, Any]] = {
    "Meta-Llama-3-8B": LLAMA_3_8B,
    "Llama-3.1-8B": LLAMA_3_8B,
    "Llama-3.1-8B-Instruct": LLAMA_3_8B,
    "Llama-3.1-70B": LLAMA_3_70B,
    "Llama-3.1-70B-Instruct": LLAMA_3_70B,
    "Llama-3.3-70B-Instruct": LLAMA_3_70B,
    "Mistral-7B-v0.3": MISTRAL_7B,
    "Mistral-7B-Instruct-v0.3": MISTRAL_7B,
    "Qwen2.5-0.5B": QWEN_2_5_HALF_B,
    "Qwen2.5-0.5B-Instruct": QWEN_2_5_HALF_B,
    "Qwen2.5-1.5B": QWEN_2_5_1_5B,
    "Qwen2.5-1.5B-Instruct": QWEN_2_5_1_5B,
    "Qwen2.5-7B": QWEN_2_5_7B,
    "Qwen2.5-7B-Instruct": QWEN_2_5_7B,
    "Qwen2.5-14B": QWEN_2_5_14B,
    "Qwen2.5-14B-Instruct": QWEN_2_5_14B,
    "ModernBERT-base": MODERNBERT_BASE,
    "Qwen3-0.6B": QWEN_3_0_6B,
    "Qwen3-8B": QWEN_3_8B,
    "Qwen3-30B-A3B": QWEN_3_30B_A3B,
    "Qwen3-30B-A3B-Instruct-2507": QWEN_3_30B_A3B | {"max_position_embeddings": 262144},
    "Llama-3.2-1B": LLAMA_3_2_1B,
    "Llama-3.2-1B-Instruct": LLAMA_3_2_1B,
    "Llama-3.2-3B": LLAMA_3_2_3B,
    "Llama-3.2-3B-Instruct": LLAMA_3_2_3B,
    "gemma-3-1b-it": GEMMA_3_1B,
    "gemma-3-4b-it": GEMMA_3_4B,
    "gpt-oss-20b": GPT_OSS_20B,
    "Mistral-Small-24B-Instruct-2501": MISTRAL_SMALL_24B,
    "SmolLM3-3B": SMOLLM3_3B,
    "phi-4": PHI_4,
    "Phi-4-mini-instruct": PHI_4_MINI,
}


def known_shape(path: str) -> Mapping[str, Any] | None:
    return SHAPES.get(path.rstrip("/").rsplit("/", 1)[-1])
