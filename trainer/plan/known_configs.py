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
}


def known_shape(path: str) -> Mapping[str, Any] | None:
    return SHAPES.get(path.rstrip("/").rsplit("/", 1)[-1])
