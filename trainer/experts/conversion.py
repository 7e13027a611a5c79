"""transformers' rules for the weight files of an architecture, which it has no public way to ask for.

A rule either renames stored tensors, or converts several while they are loaded: the matrices of single experts become
one parameter.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Rules(NamedTuple):
    """The rules that rename, and those that convert."""

    renamings: list[Any]
    converters: list[Any]


def rules_of(model: Any) -> Rules:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    return Rules(renamings, [rule for rule in rules if isinstance(rule, WeightConverter)])


def fused_names(model: Any) -> dict[str, str]:
    """Returns the attribute that holds a matrix of all experts (``gate_up_proj``), by the name that the matrix of one
    expert has in the files (``gate_proj``)."""
    found = {}
    for rule in rules_of(model).converters:
        for pattern in rule.source_patterns if len(rule.target_patterns) == 1 else ():
            if "experts.*." in pattern:
                found[pattern.removesuffix(".weight").rpartition(".")[2]] = rule.target_patterns[0].rpartition(".")[2]
    return found
