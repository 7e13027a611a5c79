"""Checks of an adapter's files, which are untrusted, before peft reads them.

peft follows `adapter_config.json`: it allocates matrices of any rank, matches any regular expression against every
module's name, imports modules for some fields, and loads further models for some types. Settings that an adapter does
not need for its use are refused here with a message. Afterwards the tensors in the file are compared with those that
peft has created, since peft ignores unknown tensors.
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
"""Types that read further files, or need more input than a text."""
LISTED = 3


def read_adapter_config(folder: Path, where: str) -> dict[str, Any]:
    """Returns the configuration of an adapter. Raises InputError if it is not a valid one, or if it needs more than
    an adapter on a base model."""
    config = read_config(folder / ADAPTER_CONFIG, where)
    file = f"{ADAPTER_CONFIG} of {where}"
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind in NOT_LOADED:
        raise InputError(f"{file} has the peft_type {str(kind)[:80]!r}, which is not loaded here")
    for name in CODE:
        if config.get("megatron_config") and config.get(name) is not None:
            raise InputError(f"{file} has {name}, which names code to be imported; take it out")
    for name, value in _numbers(config):
        if not math.isfinite(value):
            raise InputError(f"{file} has {name} {value}, which is no finite number")
    return config


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Yields the floats with their dotted names. The recursion is safe: `read_config` has limited the depth."""
    if isinstance(value, float):
        yield name, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, name)


def check_patterns(config: dict[str, Any], names: Iterable[str], where: str) -> None:
    """Raises InputError for a regular expression that is invalid, or that takes too long on ``names``, the names of the
    base's modules, against which peft would match it."""
    names = list(names)
    for field, pattern in _patterns(config):
        place = f"{field} in {ADAPTER_CONFIG} of {where}"
        try:
            expression = re.compile(pattern)
            with bounded_cpu(MATCHING_S):
                for name in names:
                    expression.match(name)
        except (re.error, RecursionError, OverflowError) as error:
            raise InputError(f"{place} is no valid regular expression: {error}") from None
        except OutOfTime:
            raise InputError(
                f"{place} is a regular expression that takes too long on this model's names; name the modules"
            ) from None


def _patterns(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields every expression, with its field, in the form that peft matches against full names."""
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
    """Raises InputError when the adapter ``name`` on the ``model`` has other tensors than its file, because it was
    trained on a base model with other layers."""
    # peft itself ignores tensors that have no place on this base.
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        saved = set(file.keys())
    laid_out = set(get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False))
    of_base = {name for name, _ in model.named_parameters()}  # peft also saves embeddings that were resized
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
