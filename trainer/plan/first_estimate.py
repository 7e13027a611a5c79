"""An estimate of a plan's largest parts from the numbers in ``config.json``, in milliseconds and without torch.

It knows decoders of the usual form: attention with grouped heads, a feed-forward with two or three matrices, perhaps
experts. With h = hidden_size, n and n_kv heads of d values, m = intermediate_size, V tokens:

    attention       h n d + 2 h n_kv d + n d h
    feed-forward    3 h m (2 h m without a gate); with experts the same of each, and h values per expert of the router
    embeddings      V h, twice unless tied

Norms and biases (below 0.1 %) and activations are left out, so that a recipe whose sum does not fit cannot fit. Where
the model writes texts, `trainer.plan.rollout_memory` adds what that takes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainer.plan.known_configs import known_shape
from trainer.plan.rollout_memory import DTYPE_BYTES, writing_bytes
from trainer.recipe import Recipe
from trainer.recipe.strategies import Mesh

CONFIG = "config.json"
WITHOUT_GATE = ("gpt_neox", "gptj", "opt", "phi", "starcoder2", "bloom", "falcon", "nemotron")
TIED = ("gemma", "starcoder2", "opt", "bloom", "falcon")
"""Types of models whose output layer is the embeddings unless the configuration says otherwise."""
OTHER_LAYERS = ("kv_lora_rank", "linear_num_value_heads", "mamba_d_state", "ssm_cfg")
"""Keys of models whose layers have another form."""
NF4_BYTES, NF4_SCALE_BYTES = 0.5, 0.0161
"""Per element: four bits, and the scale of a block of 64, quantised in turn."""
TRAINED_BYTES = 4
"""Per trained element: its float32 value, and as much for its gradient."""


@dataclass(frozen=True)
class Linear:
    """A linear layer, ``count`` times in the model; ``expert``: its matrix belongs to an expert."""

    name: str
    inputs: int
    outputs: int
    count: int
    expert: bool = False

    @property
    def elements(self) -> int:
        return self.inputs * self.outputs * self.count


@dataclass(frozen=True)
class FirstEstimate:
    """Elements of the model, and bytes on each rank. ``trained`` and what depends on it is None if the method's
    parameters do not follow from the layers' sizes."""

    parameters: int
    trained: int | None
    weight_bytes: int
    training_bytes: int | None
    writing_bytes: int = 0

    @property
    def bytes(self) -> int:
        return self.weight_bytes + (self.training_bytes or 0) + self.writing_bytes


def read_numbers(path: str) -> Mapping[str, Any] | None:
    """Returns ``config.json`` of a folder or of the Hub's cache on this machine, or the known numbers of a model of
    this name; None if a look at another machine would be needed."""
    file: Any = Path(path) / CONFIG
    if not Path(path).is_dir() and "://" not in path:
        from huggingface_hub import try_to_load_from_cache

        try:
            file = try_to_load_from_cache(path, CONFIG)
        except ValueError:  # it is no name on the Hub either
            return None
    if isinstance(file, str | Path) and Path(file).is_file():
        try:
            found = json.loads(Path(file).read_bytes())
        except (OSError, ValueError):
            return None  # the plan itself reports it
        return found if isinstance(found, dict) else None
    return known_shape(path)


def first_estimate(recipe: Recipe, config: Mapping[str, Any], ranks: int) -> FirstEstimate | None:
    """Returns None for a model of another form."""
    text = config.get("text_config", config)
    try:
        layers, tied = linears(text), text.get("tie_word_embeddings", str(text.get("model_type", "")).startswith(TIED))
        embeddings = int(text["vocab_size"]) * int(text["hidden_size"]) * (1 if tied else 2)
        writing = writing_bytes(recipe, text)
    except (KeyError, TypeError, ZeroDivisionError):
        return None
    linear = sum(layer.elements for layer in layers)
    total = linear + embeddings
    trained = total if recipe.adapter.method == "none" else _lora_elements(recipe, layers)
    row = recipe.strategy.row
    ranks = Mesh.of(recipe, ranks).ranks_per_replica  # which keep one copy together
    weights = 0.0 if recipe.adapter.method == "none" else _weight_bytes(recipe, linear, embeddings, ranks)
    if trained is None:
        return FirstEstimate(total, None, round(weights), None, writing)
    state = recipe.optimizer.row.bytes_per_element
    state += TRAINED_BYTES if row.zero_stage else 0  # DeepSpeed's own copy
    kept = TRAINED_BYTES / (ranks if row.shards == "parameters" else 1)
    states = (TRAINED_BYTES + state) / (ranks if row.sharded else 1)
    return FirstEstimate(total, trained, round(weights), round(trained * (kept + states)), writing)


def linears(text: Mapping[str, Any]) -> list[Linear]:
    """Returns the linear layers of a decoder. Raises KeyError if a number is missing, or for layers of another form."""
    if any(text.get(key) is not None for key in OTHER_LAYERS):
        raise KeyError("layers")
    hidden, count, heads = (int(text[key]) for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    kv_heads = int(text.get("num_key_value_heads") or heads)
    size = int(text.get("head_dim") or hidden // heads)
    found = [
        Linear("q_proj", hidden, heads * size, count),
        Linear("k_proj", hidden, kv_heads * size, count),
        Linear("v_proj", hidden, kv_heads * size, count),
        Linear("o_proj", heads * size, hidden, count),
    ]
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((int(text[name]) for name in names if text.get(name)), 0)
    dense = int(text.get("first_k_dense_replace") or 0) if experts else count
    gates = 0 if text.get("model_type") in WITHOUT_GATE else 1
    if dense:
        found += _feed_forward(hidden, int(text["intermediate_size"]), gates, dense)
    if experts:
        inner = int(text.get("moe_intermediate_size") or text["intermediate_size"])
        sparse = count - dense
        found += [replace(layer, expert=True) for layer in _feed_forward(hidden, inner, gates, sparse * experts)]
        shared = int(text.get("shared_expert_intermediate_size") or 0)
        shared = shared or inner * int(text.get("n_shared_experts") or 0)
        found += _feed_forward(hidden, shared, gates, sparse) if shared else []
    return found


def _feed_forward(hidden: int, inner: int, gates: int, count: int) -> list[Linear]:
    gate = [Linear("gate_proj", hidden, inner, count)] * gates
    return [*gate, Linear("up_proj", hidden, inner, count), Linear("down_proj", inner, hidden, count)]


def _weight_bytes(recipe: Recipe, linear: int, embeddings: int, ranks: int) -> float:
    width = DTYPE_BYTES[recipe.model.dtype]
    each = {"nf4": NF4_BYTES, "int8": 1.0}.get(recipe.model.quantization, float(width))
    parts = ranks if recipe.strategy.row.shards == "parameters" else 1
    scales = NF4_SCALE_BYTES if recipe.model.quantization == "nf4" else 0.0
    return (linear * each + embeddings * width) / parts + linear * scales


def _lora_elements(recipe: Recipe, layers: list[Linear]) -> int | None:
    """Returns rank x (inputs + outputs) of each target; None for other methods and for a pattern of names."""
    adapter = recipe.adapter
    targets = adapter.target_modules
    if not adapter.row.plain_lora or adapter.rank is None or (isinstance(targets, str) and targets != "all-linear"):
        return None
    chosen = [layer for layer in layers if targets in (None, "all-linear") or layer.name in targets]
    if any(layer.expert for layer in chosen) and adapter.experts is False:
        chosen = [layer for layer in chosen if not layer.expert]
    # Of an expert, the gate and the up projection are one matrix, which has one pair of rank x inputs.
    shared = sum(layer.inputs * layer.count for layer in chosen if layer.expert and layer.name == "gate_proj")
    return adapter.rank * (sum((layer.inputs + layer.outputs) * layer.count for layer in chosen) - shared)
