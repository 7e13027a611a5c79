"""An adapter's files, looked at before peft acts on them: anybody may have written them.

peft does what `adapter_config.json` says: lays out matrices of any rank, matches any regular expression against every
module's name, imports modules for some fields, loads further models for some types. What has no place in an adapter
that is only used is refused here in a sentence; afterwards the tensors in the file are held against those that peft has
laid out, since it passes over what it does not know.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from trainer.adapters.peft_generic import CODE
from trainer.adapters.targets import MATCHING_S
from trainer.bounds import OutOfTime, bounded_cpu
from trainer.errors import InputError
from trainer.model.files.configs import read_config

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NOT_LOADED = ("CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "POLY", "SHADOW", "XLORA")
"""Types that read further files, or take more than a text."""
LISTED = 3


def read_adapter_config(folder: Path, where: str) -> dict[str, Any]:
    """Raises InputError for a configuration that is none, or that asks for more than an adapter to be put on a base."""
    config = read_config(folder / ADAPTER_CONFIG, where)
    said = f"{ADAPTER_CONFIG} of {where}"
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind in NOT_LOADED:
        raise InputError(f"{said} has the peft_type {str(kind)[:80]!r}, which is not loaded here")
    for name in CODE:
        if config.get("megatron_config") and config.get(name) is not None:
            raise InputError(f"{said} has {name}, which names code to be imported; take it out")
    for name, value in _numbers(config):
        if not math.isfinite(value):
            raise InputError(f"{said} has {name} {value}, which is no finite number")
    return config


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """The numbers with a point, with their dotted names; ``value`` is not deep, since `read_config` has bounded it."""
    if isinstance(value, float):
        yield name, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, name)


def check_patterns(config: dict[str, Any], names: Iterable[str], where: str) -> None:
    """Raises InputError for a regular expression that is none, or that does not come to an end on the names of the
    base's modules, which peft would match it against."""
    names = list(names)
    for field, pattern in _patterns(config):
        said = f"{field} in {ADAPTER_CONFIG} of {where}"
        try:
            expression = re.compile(pattern)
            with bounded_cpu(MATCHING_S):
                for name in names:
                    expression.match(name)
        except (re.error, RecursionError, OverflowError) as error:
            raise InputError(f"{said} is no regular expression: {error}") from None
        except OutOfTime:
            raise InputError(
                f"{said} is a regular expression that does not come to an end on this model's names; name the modules"
            ) from None


def _patterns(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields every expression, with its field, as peft matches it against whole names."""
    for field in ("target_modules", "exclude_modules"):
        if isinstance(config.get(field), str):
            yield field, rf"(?:{config[field]})\Z"
    for field in ("rank_pattern", "alpha_pattern"):
        for key in config.get(field) or {} if isinstance(config.get(field), dict) else ():
            yield field, rf"(.*\.)?({key})$"
    layers = config.get("layers_pattern")
    for pattern in [layers] if isinstance(layers, str) else layers if isinstance(layers, list) else []:
        yield "layers_pattern", rf".*\.{pattern}\.(\d+)\."


def check_tensors(model: Any, name: str, folder: Path, base: str) -> None:
    """Raises InputError when the adapter ``name`` on the ``model`` has other tensors than its file: it was made for a
    base with other layers, and what has no place on this one would be passed over."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        saved = set(file.keys())
    laid_out = set(get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False))
    of_base = {name for name, _ in model.named_parameters()}  # peft saves embeddings along that were made larger
    foreign, lacking = sorted(saved - laid_out - of_base), sorted(laid_out - saved)
    if foreign:
        raise InputError(
            f"the adapter does not fit the base {base}: {len(foreign)} of its {len(saved)} tensors have no place there "
            f"({', '.join(foreign[:LISTED])}); name the base that it was trained on"
        )
    if lacking:
        raise InputError(
            f"the adapter does not fit the base {base}: it lacks {len(lacking)} tensors of {len(laid_out)} "
            f"({', '.join(lacking[:LISTED])}); name the base that it was trained on"
        )
