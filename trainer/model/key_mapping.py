"""Maps stored tensors to the parameters of a model.

Names in files and in the model differ where the file was saved from the model without its head, or with an older
version of the architecture: transformers' own rules are applied. A rule either renames a tensor, or converts several
while they are loaded. Of the conversions, only those that stack the matrices of a layer's experts end to end can be
read by ranges; architectures with others are loaded whole.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from trainer.errors import InputError
from trainer.experts.conversion import rules_of
from trainer.model.files.safetensors_index import JoinedLocation, Location, TensorLocation
from trainer.model.meta import NeedsFullLoad

QUANT_STATE = re.compile(r"\.(absmax|nested_absmax|quant_map|nested_quant_map|quant_state\.bitsandbytes__\w+)$")
"""Matches the tensors that bitsandbytes stores with a packed weight."""
PACKED = re.compile(r"\bparametrizations\.(\w+)\.original$")


def match_names(
    model: Any, stored: Mapping[str, TensorLocation], path: str, may_lack: Callable[[str], bool] = lambda name: False
) -> dict[str, tuple[str, ...]]:
    """Returns the names in the files of each parameter and persistent buffer of ``model``; tied ones have one entry.
    More than one stored tensor are the parameter's parts, in order (`located`).

    A tensor for which ``may_lack`` is true may be missing. Raises InputError when the files lack another one, and
    NeedsFullLoad when transformers would do more than rename and join."""
    tensors = dict(state_of(model))
    found = {name: keys for name, keys in _sources(model, stored, tensors).items() if name in tensors}
    _check_ties(tensors, found)
    _check_missing(model, path, {n: t for n, t in tensors.items() if n in found or not may_lack(n)}, found)
    return found


def located(stored: Mapping[str, TensorLocation], keys: tuple[str, ...], shape: torch.Size) -> Location:
    """Returns the location of a parameter that is stored as ``keys``; ``shape``: its own, if these are several."""
    if len(keys) == 1:
        return stored[keys[0]]
    return JoinedLocation(tuple(stored[key] for key in keys), tuple(shape))


def state_of(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the tensors that a model's files hold (parameters, persistent buffers), under each of their names. Packed
    experts have the names of the unpacked ones."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        yield PACKED.sub(r"\1", name), parameter
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if name.rsplit(".", 1)[-1] not in module._non_persistent_buffers_set:
                yield name, buffer


def _sources(
    model: Any, stored: Mapping[str, TensorLocation], tensors: Mapping[str, torch.Tensor]
) -> dict[str, tuple[str, ...]]:
    """Returns the stored names by the name in the model."""
    from transformers.core_model_loading import dot_natural_key, rename_source_key

    (renamings, converters), known, prefix = rules_of(model), dict(tensors), model.base_model_prefix
    sources: dict[str, tuple[str, ...]] = {}
    converted: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in sorted(stored, key=dot_natural_key):  # the order in which transformers joins them
        if QUANT_STATE.search(name):
            continue
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if renamed not in known and name in known:
            renamed, pattern = rename_source_key(name, [], [], prefix, known)
        if pattern is None:
            sources[renamed] = (name,)
        else:
            converted[renamed][pattern].append(name)
    for target, by_pattern in converted.items():
        rule = next(rule for rule in converters if set(by_pattern) <= set(rule.source_patterns))
        sources[target] = _joined(rule, by_pattern, stored)
    return sources


def check_by_shard(base: torch.nn.Module, quantization: str, method: str, *, from_base: bool) -> None:
    """Raises NeedsFullLoad if no rank can load only its part of ``base`` (with or without its adapter), as far as this
    is known without its files. ``from_base``: the adapter of this method is made from the base's weights."""
    if quantization == "int8":
        raise NeedsFullLoad("bitsandbytes quantises whole weights to int8")
    if from_base:
        raise NeedsFullLoad(f"{method} is made from the whole of the base's weights")
    held = {name.replace(".base_layer", "").removesuffix(".weight").rpartition(".")[2] for name, _ in state_of(base)}
    model: Any = base
    for rule in rules_of(model.get_base_model() if hasattr(model, "get_base_model") else model).converters:
        targets = {pattern.removesuffix(".weight").rpartition(".")[2] for pattern in rule.target_patterns}
        if targets & held and not _stacks(rule):
            raise NeedsFullLoad(f"transformers converts its stored {rule.source_patterns[0]} while it loads it")


def _stacks(rule: Any) -> bool:
    """Returns True for a rule that only stacks experts, each of one matrix or of several below each other."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    first, *more = rule.operations
    below = [isinstance(operation, Concatenate) and operation.dim == 1 for operation in more]
    return isinstance(first, MergeModulelist) and first.dim == 0 and below in ([], [True])


def _joined(rule: Any, by_pattern: Mapping[str, list[str]], stored: Mapping[str, TensorLocation]) -> tuple[str, ...]:
    """Returns the stored tensors of one parameter, in the order in which they follow each other in it. Raises
    NeedsFullLoad for a rule that does more than stack experts."""
    columns = [by_pattern[pattern] for pattern in rule.source_patterns if pattern in by_pattern]
    names = [name for experts in zip(*columns, strict=False) for name in experts]
    alike = len({(stored[name].shape, stored[name].dtype) for name in names}) == 1
    whole = len(columns) == len(rule.source_patterns) and len({len(experts) for experts in columns}) == 1
    if not (_stacks(rule) and alike and whole):
        raise NeedsFullLoad(f"transformers converts its stored {names[0]} while it loads it")
    return tuple(names)


def _check_ties(tensors: Mapping[str, torch.Tensor], found: Mapping[str, tuple[str, ...]]) -> None:
    stored: dict[int, list[str]] = defaultdict(list)
    for name in found:
        stored[id(tensors[name])].append(name)
    twice = next((names for names in stored.values() if len(names) > 1), None)
    if twice:
        raise NeedsFullLoad(f"its files hold {' and '.join(twice)}, which are one tensor in the model")


def _check_missing(
    model: Any, path: str, tensors: Mapping[str, torch.Tensor], found: Mapping[str, tuple[str, ...]]
) -> None:
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
