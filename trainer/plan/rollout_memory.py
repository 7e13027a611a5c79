"""The memory of texts that are written in training, and of what rates them (tasks `ppo` and `grpo`).

The model in training writes the answers to a micro-batch of prompts at the same time. For each token of a row it holds
keys and values, in every layer with attention:

    cache = rows · min(tokens, window) · n_kv · (d_key + d_value) · bytes, over the layers

with tokens = sequence_length + max_new_tokens. A layer's keys or values exist twice while a token is added. To draw a
token, two numbers in float64 per row and entry of the vocabulary are needed. The prompts' forward, whose activations
are freed layer by layer, is left out.

A server of vLLM on GPUs of the training takes a share of them, whatever it holds; one with GPUs of its own takes none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from trainer.recipe import Recipe
from trainer.recipe.sections.rollouts.grpo import GRPOSection

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
DRAWING_BYTES = 16
WITHOUT_CACHE = ("linear_attention", "conv", "mamba", "recurrent")
"""Types of layers whose state does not grow with the text."""
WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}


class RolloutBytes(NamedTuple):
    """Bytes of a rank: ``writing``, while the model in training writes texts; ``server``, of a vLLM server on its GPU;
    ``reward``, the weights of a reward model of its own."""

    writing: int = 0
    server: int = 0
    reward: int = 0

    @classmethod
    def of(cls, recipe: Recipe, text: Mapping[str, Any], device: int | None, reward: int = 0) -> RolloutBytes:
        """``text``: the configuration of the base model's decoder; ``device``: bytes of a GPU, if they are known."""
        if recipe.rollout_section is None:
            return cls()
        return cls(writing_bytes(recipe, text), server_bytes(recipe, device), reward)


def text_numbers(config: Any) -> Mapping[str, Any]:
    """Returns the numbers of a configuration of transformers that `writing_bytes` reads, which architectures store
    under names of their own."""
    names = (
        *("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size", "vocab_size", "num_hidden_layers"),
        *("kv_lora_rank", "qk_rope_head_dim", "num_kv_shared_layers", "layer_types"),
        *WINDOWS.values(),
    )
    return {name: getattr(config, name, None) for name in names}


def rows_of(recipe: Recipe) -> int:
    """Returns the texts that a rank writes at a time; 0 if no text is written by the model in training."""
    section = recipe.rollout_section
    if section is None or recipe.rollout.row.serves:
        return 0
    answers = max(section.answers, section.eval_answers if isinstance(section, GRPOSection) else 1)
    return recipe.training.micro_batch * answers


def writing_bytes(recipe: Recipe, text: Mapping[str, Any]) -> int:
    """Raises KeyError if the configuration lacks a number."""
    section, rows = recipe.rollout_section, rows_of(recipe)
    if section is None or not rows:
        return 0
    tokens = recipe.data.sequence_length + section.max_new_tokens
    each = rows * _values_per_token(text) * DTYPE_BYTES[recipe.model.dtype]
    layers = [each * held for held in _tokens_held(text, tokens)]
    return sum(layers) + max(layers, default=0) // 2 + rows * int(text["vocab_size"]) * DRAWING_BYTES


def _values_per_token(text: Mapping[str, Any]) -> int:
    heads = int(text.get("num_attention_heads") or 0)
    if text.get("kv_lora_rank"):  # latent vectors, which all heads share; older versions of transformers expand them
        return int(text["kv_lora_rank"]) + int(text["qk_rope_head_dim"])
    size = int(text.get("head_dim") or int(text["hidden_size"]) // max(1, heads))
    return 2 * int(text.get("num_key_value_heads") or heads) * size


def _tokens_held(text: Mapping[str, Any], tokens: int) -> Iterator[int]:
    """Yields the tokens that each layer's cache holds. Where the kinds of layers are not named, every layer is assumed
    to have the window, so that no more is counted than there is."""
    count = int(text["num_hidden_layers"]) - int(text.get("num_kv_shared_layers") or 0)
    kinds = list(text.get("layer_types") or ["sliding_attention"] * count)[:count]
    for kind in kinds:
        if kind not in WITHOUT_CACHE:
            yield min(tokens, int(text.get(WINDOWS.get(kind, "")) or tokens))


def server_bytes(recipe: Recipe, device: int | None) -> int:
    """Returns what a server of muster's own takes of a GPU with ``device`` bytes; 0 if there is none."""
    if device is None or not has_server(recipe) or not recipe.resources.gpus_per_worker:
        return 0
    return int(recipe.rollout.vllm.memory_share * device)


def has_server(recipe: Recipe) -> bool:
    """Returns True if muster starts a server on each node, on GPUs of the training."""
    rollout = recipe.rollout
    started = rollout.row.serves and not rollout.addresses and not rollout.servers_beside
    return recipe.rollout_section is not None and started
