"""The identity of the base model that something was trained on: sizes from its configuration, a digest of samples of
its weights.

A path does not identify a model: its content may have been replaced. ETags differ between copies of the same model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.errors import InputError
from trainer.model.files.configs import read_config
from trainer.model.files.fetch import fetch_model
from trainer.model.files.safetensors_index import TensorLocation, read_headers
from trainer.model.files.weight_source import WeightSource
from trainer.recipe.sections.model import ModelSection

SHAPE: dict[str, tuple[str, ...]] = {
    "num_hidden_layers": ("n_layer", "num_layers"),
    "hidden_size": ("n_embd", "d_model"),
    "num_attention_heads": ("n_head", "num_heads"),
    "num_key_value_heads": (),
    "intermediate_size": ("n_inner", "ffn_dim"),
    "num_experts": ("num_local_experts", "n_routed_experts"),
}
"""The values of a configuration that are compared, each with its names in other model families."""
SAMPLED, SAMPLE_BYTES = 8, 4096
"""The number of tensors, and of bytes in the middle of each. Another training of the same architecture differs in
all of them."""
WEIGHTS = "weights"


def identity_of(section: ModelSection) -> dict[str, Any]:
    """Reads the configuration, the headers, and a few ranges of the weights; only the configuration where the weights
    are not safetensors. Raises InputError where there is no model."""
    folder = fetch_model(section, weights=False).folder
    source = WeightSource(section.path if "://" in section.path else str(folder))
    try:
        return {**_shape(folder), WEIGHTS: _sampled(source, read_headers(source, section.path))}
    except InputError:
        return _shape(folder)
    finally:
        source.close()


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns ``num_hidden_layers 2 is 3 here`` for each value that both contain and that differs."""
    return [
        f"{name} {str(was[name])[:80]} is {now[name]} here" for name in now if was.get(name, now[name]) != now[name]
    ]


def _shape(folder: Path) -> dict[str, Any]:
    config = read_config(folder / "config.json", str(folder))
    text = config.get("text_config")
    config |= text if isinstance(text, dict) else {}
    found = {name: next((config[n] for n in (name, *others) if n in config), None) for name, others in SHAPE.items()}
    return {name: value for name, value in found.items() if isinstance(value, int)}


def _sampled(source: WeightSource, stored: Mapping[str, TensorLocation]) -> str:
    names = sorted(stored, key=lambda name: (-stored[name].bytes, name))[: SAMPLED * 4 : 4]
    digest = hashlib.sha256(f"{len(stored)}".encode())
    for name in names:
        place = stored[name]
        size = min(place.bytes, SAMPLE_BYTES)
        start = place.start + (place.bytes - size) // 2
        digest.update(f"{name} {place.dtype} {place.shape}".encode())
        # Not source.read(): its cache of blocks would fetch megabytes for each of these ranges.
        digest.update(source.storage.read_range(place.file, start, start + size))
    return digest.hexdigest()[:32]
