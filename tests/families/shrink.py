"""Small configurations of any architecture of transformers, by rules over the names of a configuration's settings.

A configuration class declares the sizes of a published model as its defaults. Widths shrink in proportion to the hidden
size, other sizes to the values below, and the layers are the first of each kind. So a class that transformers adds is
shrunk by the same rules. ``EXTRA`` has what the names of a few classes do not tell.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

VOCABULARY = 512
"""Larger than the vocabulary of the texts, so that the highest ids, which mean images or sounds, are in no text."""
HIDDEN, HEAD, HEADS, EXPERTS, LAYERS, WINDOW, POSITIONS = 64, 16, 4, 4, 2, 16, 256
MOST_LAYERS = 12
PAD, BOS, EOS = 0, 1, 2
"""Ids of the tests' tokenizer."""

COUNTS_LAYERS = re.compile(
    r"(n_layers?|num_(hidden_|decoder_|encoder_)?layers|(en|de)coder_layers|num_blocks|depth|num_global_layers"
    r"|\w+_num_hidden_layers|num_layers_per_stack)"
)
TEXT_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
HIDDEN_SIZE = ("hidden_size", "d_model", "n_embd", "embedding_dim", "emb_dim", "embed_dim")


def _at_most(limit: int) -> Callable[[int, str], int]:
    return lambda value, name: min(value, limit)


def _token(value: int, name: str) -> int:
    known = {"pad": PAD, "bos": BOS, "eos": EOS, "decoder_start": BOS, "unk": 3}
    # Others get ids at the end of the vocabulary, one for each name.
    return known.get(name.split("_token")[0], VOCABULARY - 1 - sum(map(ord, name)) % 97)


RULES: tuple[tuple[str, Callable[[int, str], int]], ...] = (
    (r".*_token_(id|index)", _token),
    (r"\w*vocab(_size\w*|_offset)?", _at_most(VOCABULARY)),
    (r"\w*(key_value|kv)_(n_)?heads", _at_most(2)),
    (r"mamba_n(um)?_heads", _at_most(2 * HEADS)),
    (r"n_mamba_heads|linear_num_key_heads", _at_most(2)),
    (r"num_attention_heads_per_layer|n_heads?|.*(num|attention|n)_heads?|num_query_groups", _at_most(HEADS)),
    (r"rotary_dim", _at_most(HEAD // 2)),
    (r".*(head_?dim|d_head|dim_head|head_size|d_kv|kv_channels)|.*state_size|.*d_state", _at_most(HEAD)),
    (r"query_pre_attn_scalar", _at_most(HEAD)),
    (r"(\w*_)?num_(local_)?experts|n_routed_experts|zero_expert_num", _at_most(EXPERTS)),
    (r"\w*(experts_per_tok\w*|top_?k|_k)", _at_most(2)),
    (r"n_group|num_expert_group|\w*n_?groups", _at_most(2)),
    (r"topk_group", _at_most(1)),
    (r"first_k_dense_replace|num_dense_layers|num_kv_shared_layers", _at_most(1)),
    (r"\w*(interval|period|layer_freq|every_n_layers|window_pattern|group_size)", _at_most(2)),
    (r"\w*layer_offset", _at_most(1)),
    (r"\w*(window|chunk|index_topk|floor|block_size|local_attention)\w*", _at_most(WINDOW)),
    (r"\w*(position\w*|max_seq_len|context_length|n_ctx|max_length|rel_extent|mem_len)", _at_most(POSITIONS)),
)
"""For the sizes whose full names match: the first that does."""

KEPT = r"\w*(kernel|conv|buckets|pretraining_tp|lang|seed|channels|image_size|patch|multiple|divisible|expand)\w*"
"""Names whose values stay as they are."""
RANDOM = re.compile(r"\w*(drop(out|_rate|_path)?|pdrop|jitter)\w*")

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
INDEXED = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": HEAD, "indexer_budget": WINDOW,
    "indexer_compress_ratio": 4,
}  # fmt: skip
KEYS_SHARED = {
    "num_hidden_layers": 4, "num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip

EXTRA: Mapping[str, Mapping[str, Any]] = {
    # What the defaults leave open, and the model then needs.
    "cohere_compass_text": {"rope_parameters": {kind: dict(ROPE) for kind in ("full_attention", "sliding_attention")}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": EXPERTS, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "hunyuan_v1_dense": {"head_dim": HEAD},
    "hunyuan_v1_moe": {"head_dim": HEAD, "num_experts": EXPERTS, "moe_topk": 2},
    "lfm2_moe": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "ministral": {"head_dim": HEAD},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": INDEXED,
    "qwen4_exp": {"text_config": INDEXED},
    "xmod": {"default_language": "en_XX"},
    # With few heads, tokens have the same score in the index, and the order decides between them.
    "axk2": {"index_n_heads": 24},
    "deepseek_v32": {"index_n_heads": 24},
    "glm_moe_dsa": {"index_n_heads": 24},
    "hy_v4": {"index_n_heads": 24},
    # Longer texts need a mask, which transformers leaves out for a single text: its tokens then see what follows them.
    "doge": {"keep_window_size": POSITIONS},
    # Published models have both kinds of layers, the defaults one.
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]},
    "lfm2": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    # Layers that share keys and values: half of them, one of each kind.
    "gemma3n_text": KEYS_SHARED,
    "gemma3n": {"text_config": KEYS_SHARED},
    # Layers that share their weights: two of them, so that they do.
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    "zamba2": {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    # Sizes that follow from others.
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "mamba2": {"num_heads": 2 * HEADS},
}
"""Settings for the model types whose own rules these names do not show."""


def small_config(model_type: str) -> Any:
    """Returns a small configuration with every kind of layer of the architecture's default one."""
    from transformers import CONFIG_MAPPING

    return _small(CONFIG_MAPPING[model_type], dict(EXTRA.get(model_type, {})))


def _small(kind: type[Any], extra: dict[str, Any]) -> Any:
    kinds = _parts(kind)
    parts = {name: _small(part, dict(extra.pop(name, {}))) for name, part in kinds.items()}
    settings = {**_shrunk(kind), **parts, **extra}
    counts = [name for name in settings if COUNTS_LAYERS.fullmatch(name)]
    deep = kind(**settings)
    chosen, lists = _layers(deep, set(_declared(kind)))
    settings |= dict.fromkeys(counts, chosen)
    return kind(**{**settings, **lists, **extra})


def _parts(kind: type[Any]) -> dict[str, type[Any]]:
    """Returns the classes of the configurations inside (of the text model, of a vision tower)."""
    if not kind.sub_configs:
        return {}
    default = kind()
    parts = {name: getattr(default, name, None) for name in kind.sub_configs}
    return {name: type(part) for name, part in parts.items() if hasattr(part, "sub_configs")}


def _declared(kind: type[Any]) -> dict[str, Any]:
    """Returns the defaults that the class declares. Others are None: the class computes them from these."""
    found = {}
    for field in dataclasses.fields(kind):
        if field.default is not dataclasses.MISSING:
            found[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
    return found


def _shrunk(kind: type[Any]) -> dict[str, Any]:
    declared = _declared(kind)
    heads = [value for name, value in declared.items() if re.fullmatch(r"num_attention_heads|n_heads?", name)]
    width = next((declared[name] for name in HIDDEN_SIZE if isinstance(declared.get(name), int)), HIDDEN)
    small = {name: _smaller(name, value, width) for name, value in declared.items()}
    for name in small.keys() & {"num_key_value_heads", "num_kv_heads"}:
        if declared[name] in heads:  # some architectures have as many of both only
            small[name] = HEADS
    if "is_decoder" in declared:  # encoders that can be decoders too
        small["is_decoder"] = True
    return {name: value for name, value in small.items() if value != declared[name] or COUNTS_LAYERS.fullmatch(name)}


def _smaller(name: str, value: Any, width: int) -> Any:
    if isinstance(value, list | tuple) and value and all(type(one) is int for one in value):
        return [_smaller(name, one, width) for one in value]
    if RANDOM.fullmatch(name):
        return 0.0 if type(value) in (int, float) else value
    if type(value) is not int or value <= 0 or COUNTS_LAYERS.fullmatch(name) or re.fullmatch(KEPT, name):
        return value
    for pattern, rule in RULES:
        if re.fullmatch(pattern, name):
            return rule(value, name)
    # The rest are widths if they are large.
    return value if value <= HEAD else max(8, round(value * HIDDEN / width / 8) * 8)


def _layers(deep: Any, settable: set[str]) -> tuple[int, dict[str, Any]]:
    """Returns a number of layers that holds each kind of layer, and the lists that say of which kind each layer is."""
    count = next((value for name in vars(deep) if name in TEXT_LAYERS and (value := getattr(deep, name))), None)
    lists = {name: list(value) for name, value in _attributes(deep) if len(value) == count and _tells_kinds(value)}
    if not lists:
        return LAYERS, {}
    kinds = [repr(kind) for kind in zip(*lists.values(), strict=True)]
    first = [i for i, kind in enumerate(kinds) if kind not in kinds[:i]]
    if lists.keys() <= settable:
        picked = first if len(first) >= LAYERS else [*first, *(i for i in range(len(kinds)) if i not in first)][:LAYERS]
        picked = sorted(picked)[:MOST_LAYERS]
        return len(picked), {name: [value[i] for i in picked] for name, value in lists.items()}
    return min(max(LAYERS, first[-1] + 1), MOST_LAYERS), {}


def _tells_kinds(value: Sequence[Any]) -> bool:
    """Returns False for the numbers of some layers, and for lists of anything but plain values."""
    plain = all(isinstance(one, str | int | float | bool | None) for one in value)
    return plain and list(value) != list(range(len(value)))


def _attributes(config: Any) -> Iterator[tuple[str, Any]]:
    """Yields the lists among the settings and the properties."""
    for name in {**vars(type(config)), **vars(config)}:
        with suppress(Exception):  # a property may need what this configuration lacks
            value = getattr(config, name)
            if not name.startswith("_") and isinstance(value, list | tuple):
                yield name, value
