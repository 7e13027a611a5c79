"""Reads the JSON files next to a model's or an adapter's weights before transformers or peft does.

How these libraries fail on a deeply nested file, or on values of the wrong type, changes between their versions."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TypedDict

from huggingface_hub.errors import StrictDataclassError

from trainer.errors import InputError
from trainer.parsing import Malformed, parse_json
from trainer.records import read_record

LARGEST_CONFIG = 64 << 20
"""In bytes; the index of the largest models has a few million."""
MOST_MODULES = 10_000
COUNTED = re.compile(r"layers?$|experts$|blocks$")
"""Matches the names of module counts: num_hidden_layers, n_layer, n_routed_experts."""
CONFIG_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "preprocessor_config.json",
    "adapter_config.json",
    "model.safetensors.index.json",
)
UNUSABLE = (
    OSError, ValueError, LookupError, ImportError, TypeError, AttributeError, ArithmeticError, AssertionError,
    RecursionError, NotImplementedError, StrictDataclassError,
)  # fmt: skip
"""The exceptions that libraries raise for an impossible configuration."""
LONGEST_CAUSE = 300


class Config(TypedDict, total=False):
    """The fields that muster reads in ``config.json`` and ``adapter_config.json``; the rest is for their libraries."""

    architectures: list[str] | None
    id2label: dict[str, Any] | None
    pad_token_id: int | None
    peft_type: str | None
    task_type: str | None
    base_model_name_or_path: str | None
    revision: str | None
    use_dora: bool | None
    use_rslora: bool | None


def read_config(path: Path, where: str) -> dict[str, Any]:
    """Reads one such file. Raises InputError, which names the folder as ``where``, when it holds no usable object.

    NaN, infinities and duplicate keys are accepted, since the libraries accept them."""
    try:
        if path.stat().st_size > LARGEST_CONFIG:
            raise Malformed(f"it has more than {LARGEST_CONFIG:,} bytes")
        found = dict(read_record(Config, parse_json(path.read_bytes(), finite=False, unique=False)))
        _check_counts(found)
        return found
    except OSError as error:
        raise InputError(f"{path.name} of {where} cannot be read: {error.strerror or error}") from error
    except Malformed as error:
        raise InputError(f"{where} has a {path.name} that cannot be used: {error}") from error


def _check_counts(config: dict[str, Any]) -> None:
    # transformers builds a module for each layer and expert before it compares anything with the weights: a count
    # that is too large would take hours or all memory.
    for name, value in config.items():
        if isinstance(value, dict):
            _check_counts(value)
        elif isinstance(value, int) and COUNTED.search(name) and value > MOST_MODULES:
            raise Malformed(f"{name} is {value}, and at most {MOST_MODULES:,} are built")


def cause(error: BaseException) -> str:
    """Returns the library's message on one line."""
    return " ".join(str(error).split())[:LONGEST_CAUSE] or type(error).__name__


def check_configs(folder: Path, where: str) -> None:
    """Raises InputError for the first of `CONFIG_FILES` in ``folder`` that cannot be used."""
    for name in CONFIG_FILES:
        if (folder / name).is_file():
            read_config(folder / name, where)
