"""Resolution of ``adapter.target_modules``: the modules of a model that get an adapter."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch

from trainer.bounds import OutOfTime, bounded_cpu
from trainer.errors import InputError

LISTED_MODULES = 20
MATCHING_S = 20.0
"""Limit of processor time to match all module names of a model, in seconds; milliseconds are usual."""
ALL_LINEAR = "all-linear"
Targets = str | tuple[str, ...] | list[str]


def linear_modules(base: torch.nn.Module) -> list[str]:
    """Returns the full names of the linear layers: quantised ones (subclasses of ``nn.Linear``) and GPT-2's Conv1D
    included."""
    return [n for n, m in base.named_modules() if isinstance(m, torch.nn.Linear) or type(m).__name__ == "Conv1D"]


def heads(base: Any) -> set[str]:
    """Returns the names of the linear layers that are heads: the output embeddings, and all layers outside the backbone
    (a classifier, a score, a value head)."""
    output = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    backbone = getattr(base, "base_model_prefix", "")
    inside = f"{backbone}." if backbone and hasattr(base, backbone) else ""
    return {n for n in linear_modules(base) if base.get_submodule(n) is output or not n.startswith(inside)}


def resolve(base: torch.nn.Module, targets: Targets) -> str | list[str]:
    """Returns the targets for peft: the recipe's own value, or full names if that would match a head by accident.

    Raises InputError when a target matches no linear layer of the model."""
    check_targets(base, targets)
    avoided = heads(base)
    if targets == ALL_LINEAR:
        return [n for n in linear_modules(base) if n not in avoided]
    # All modules, not only the linear ones: peft must see, and refuse, everything that a pattern matches.
    names = [n for n, _ in base.named_modules() if n]
    hit = set(_matched(names, targets))
    accidents = {n for n in hit & avoided if not _named(n, names, avoided, targets)}
    if accidents:
        return sorted(hit - accidents)
    return targets if isinstance(targets, str) else list(targets)


def check_targets(base: torch.nn.Module, targets: Targets) -> None:
    """Raises InputError when a target matches no linear layer of the model."""
    # peft ignores a typo in a list if another entry matches.
    if targets == ALL_LINEAR:
        return
    names = linear_modules(base)
    wanted = [targets] if isinstance(targets, str) else list(targets)
    try:
        with bounded_cpu(MATCHING_S):
            missing = [t for t in wanted if not any(_matches(t, n, is_pattern=isinstance(targets, str)) for n in names)]
    except OutOfTime:
        raise InputError(
            f"adapter.target_modules {targets!r} is a regular expression that takes too long on this model's names; "
            "name the modules"
        ) from None
    if missing:
        leaves = sorted({n.rsplit(".", 1)[-1] for n in names})[:LISTED_MODULES]
        raise InputError(
            f"adapter.target_modules {missing} match no linear layer of this model; there are {', '.join(leaves)} "
            "(a single string is a regular expression over full names such as "
            f"{names[0]!r}; or write all-linear)"
        )


def matched_linear(base: torch.nn.Module, targets: str | list[str]) -> list[str]:
    """Returns the full names of the linear layers that resolved targets match."""
    return _matched(linear_modules(base), targets)


def check_names(base: torch.nn.Module, setting: str, wanted: Iterable[str]) -> None:
    """Raises InputError when one of ``wanted`` ends the name of no module of the model."""
    names = [n for n, _ in base.named_modules()]
    missing = [w for w in wanted if not any(_matches(w, n, is_pattern=False) for n in names)]
    if missing:
        top = [n for n, _ in base.named_children()]
        raise InputError(f"{setting} {missing} name no module of this model; its top modules are {', '.join(top)}")


def _named(head: str, names: list[str], avoided: set[str], targets: Targets) -> bool:
    """Returns True if the recipe targets this head on purpose: by an entry that matches heads only, or by a pattern
    that contains its name."""
    if isinstance(targets, str):
        return head.rsplit(".", 1)[-1] in targets
    entries = [t for t in targets if _matches(t, head, is_pattern=False)]
    return any(set(_matched(names, [entry])) <= avoided for entry in entries)


def _matched(names: list[str], targets: Targets) -> list[str]:
    if isinstance(targets, str):
        return [n for n in names if _matches(targets, n, is_pattern=True)]
    return [n for n in names if any(_matches(t, n, is_pattern=False) for t in targets)]


def _matches(target: str, name: str, *, is_pattern: bool) -> bool:
    if is_pattern:
        return re.fullmatch(target, name) is not None
    return name == target or name.endswith(f".{target}")
