"""Small mixtures of experts of several architectures, with random weights that are not near zero."""

from __future__ import annotations

from typing import Any

import torch

SHAPE: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
    "num_local_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen3_moe": {},
    "deepseek_v3": {
        "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
        "num_key_value_heads": 4, "head_dim": 8, **LATENT,
    },
    "gpt_oss": {},  # transposed, interleaved, with biases
    "nemotron_h": {
        "hybrid_override_pattern": "*E", "n_routed_experts": 4, "mamba_num_heads": 8, "mamba_head_dim": 16,
        "moe_shared_expert_intermediate_size": 32,
    },  # no gate
    "llama4_text": {"num_experts_per_tok": 1, "intermediate_size_mlp": 64, "moe_layers": [1]},  # no interface
    "phimoe": {},  # routers that are a subclass of nn.Linear
    "jetmoe": {"kv_channels": 16},  # experts in the attention too
}  # fmt: skip


def experts_config(kind: str, **changes: Any) -> Any:
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[kind](**{**SHAPE, **ARCHITECTURES[kind], **changes})


def experts_model(kind: str, **changes: Any) -> Any:
    """The model, frozen, in float32."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(experts_config(kind, **changes), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return model.eval().requires_grad_(False)
