"""Maps stored tensors to the parameters of a model.

Names in files and in the model differ where the file was saved from the model without its head, or with an older
version of the architecture: transformers' own renaming rules are applied. Architectures whose rules do more than rename
(experts that are fused while they are loaded) cannot be loaded by ranges.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from trainer.errors import InputError
from trainer.model.files.safetensors_index import TensorLocation
from trainer.model.meta import NeedsFullLoad

QUANT_STATE = re.compile(r"\.weight\.(absmax|nested_absmax|quant_map|nested_quant_map|quant_state\.bitsandbytes__\w+)$")
"""Matches the tensors that bitsandbytes stores with a packed weight."""


def match_names(
    model: Any, stored: Mapping[str, TensorLocation], path: str, may_lack: Callable[[str], bool] = lambda name: False
) -> dict[str, str]:
    """Returns the name in the files of each parameter and persistent buffer of ``model``; tied ones have one entry.

    A tensor for which ``may_lack`` is true may be missing. Raises InputError when the files lack another one, and
    NeedsFullLoad when transformers would do more than rename."""
    tensors = dict(state_of(model))
    found = {renamed: name for name, renamed in _renamed(model, stored, tensors) if renamed in tensors}
    _check_ties(tensors, found)
    _check_missing(model, path, {n: t for n, t in tensors.items() if n in found or not may_lack(n)}, found)
    return found


def state_of(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the tensors that a model's files hold (parameters, persistent buffers), under each of their names."""
    yield from model.named_parameters(remove_duplicate=False)
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if name.rsplit(".", 1)[-1] not in module._non_persistent_buffers_set:
                yield name, buffer


def _renamed(
    model: Any, stored: Mapping[str, TensorLocation], tensors: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, str]]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings: Any = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters: Any = [rule for rule in rules if isinstance(rule, WeightConverter)]
    known: Any = tensors
    prefix = model.base_model_prefix
    for name in stored:
        if QUANT_STATE.search(name):
            continue
        renamed, converted = rename_source_key(name, renamings, converters, prefix, known)
        if renamed not in known and name in known:
            renamed, converted = rename_source_key(name, [], [], prefix, known)
        if converted is not None:
            raise NeedsFullLoad(f"transformers converts its stored {name} while it loads it")
        yield name, renamed


def _check_ties(tensors: Mapping[str, torch.Tensor], found: Mapping[str, str]) -> None:
    stored: dict[int, list[str]] = defaultdict(list)
    for name in found:
        stored[id(tensors[name])].append(name)
    twice = next((names for names in stored.values() if len(names) > 1), None)
    if twice:
        raise NeedsFullLoad(f"its files hold {' and '.join(twice)}, which are one tensor in the model")


def _check_missing(model: Any, path: str, tensors: Mapping[str, torch.Tensor], found: Mapping[str, str]) -> None:
    there = {id(tensors[name]) for name in found}
    missing = sorted(name for name, tensor in tensors.items() if id(tensor) not in there)
    ignored = "|".join(f"({pattern})" for pattern in model._keys_to_ignore_on_load_missing or ())
    drawn = [name for name in missing if ignored and re.search(ignored, name)]
    lacking = [name for name in missing if name not in drawn]
    if lacking and type(model).__name__.endswith("ForSequenceClassification"):
        raise NeedsFullLoad(f"its files lack {lacking[0]}, or hold it under another name")
    if lacking:
        raise InputError(
            f"model.path {path!r} lacks {len(lacking)} weights of a causal language model ({', '.join(lacking[:3])}); "
            "name a complete checkpoint, with its output head"
        )
    if drawn:
        raise NeedsFullLoad(f"its files lack {drawn[0]}, which transformers initialises")
