"""Resolution of ``adapter.target_modules``: the layers and experts of a model that get an adapter."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch

from trainer.bounds import OutOfTime, bounded_cpu
from trainer.errors import InputError
from trainer.experts import expert_weights, fused_names, is_mixture, routers
from trainer.modules import computes_plain_product, text_model

LISTED_MODULES = 20
MATCHING_S = 20.0
"""Limit of processor time to match all module names of a model, in seconds; milliseconds are usual."""
ALL_LINEAR = "all-linear"
PLAIN = ("torch", "bitsandbytes", "trainer")
"""Packages whose subclasses of ``nn.Linear`` compute the product itself; other ones are defined beside models."""
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


def towers(base: Any) -> set[str]:
    """Returns the names of the linear layers of a model for several media that do not read text, such as a vision
    encoder's: training on text does not use them."""
    text = text_model(base)
    inside = next((f"{name}." for name, module in base.named_modules() if module is text and name), "")
    return {n for n in linear_modules(base) if not n.startswith(inside)}


def others(base: torch.nn.Module) -> set[str]:
    """Returns the names of the layers of subclasses of ``nn.Linear`` that compute more than a product, or another."""
    layers = {n: type(base.get_submodule(n)) for n in linear_modules(base)}
    kinds = {kind for kind in layers.values() if kind.__module__.partition(".")[0] not in PLAIN}
    unlike = {kind for kind in kinds if issubclass(kind, torch.nn.Linear) and not computes_plain_product(kind)}
    return {name for name, kind in layers.items() if kind in unlike}


def resolve(base: torch.nn.Module, targets: Targets, *, experts: bool = False) -> str | list[str]:
    """Returns the targets for peft: the recipe's own value, or full names if that would match a head by accident.
    ``all-linear`` means every layer but heads, routers, and parts of the model that text does not reach.

    ``experts``: a target may match experts only (`targeted_experts`). Raises InputError when one matches nothing."""
    check_targets(base, targets, experts=experts)
    avoided = heads(base)
    if targets == ALL_LINEAR:
        unused = avoided | routers(base) | towers(base) | others(base)
        return [n for n in linear_modules(base) if n not in unused]
    # All modules, not only the linear ones: peft must see, and refuse, everything that a pattern matches.
    names = [n for n, _ in base.named_modules() if n]
    hit = set(_matched(names, targets))
    accidents = {n for n in hit & avoided if not _named(n, names, avoided, targets)}
    if accidents or is_mixture(base):  # in such models, peft gives short names other meanings
        return sorted(hit - accidents)
    return targets if isinstance(targets, str) else list(targets)


def targeted_experts(base: torch.nn.Module, targets: Targets) -> list[str]:
    """Returns the full names of the parameters that hold targeted experts: all of them for ``all-linear``. An entry
    names such a parameter (``gate_up_proj``), or a matrix that is fused into it (``gate_proj``)."""
    found = expert_weights(base)
    return [n for n in found if targets == ALL_LINEAR or _matched(_aliases(base, n), targets)]


def matched_modules(base: torch.nn.Module, targets: str | list[str]) -> list[str]:
    """Returns the full names of the modules of any kind that resolved targets match."""
    return _matched([n for n, _ in base.named_modules() if n], targets)


def check_targets(base: torch.nn.Module, targets: Targets, *, experts: bool = False) -> None:
    """Raises InputError when a target matches no linear layer of the model, and no expert."""
    # peft ignores a typo in a list if another entry matches.
    if targets == ALL_LINEAR:
        return
    linear = linear_modules(base)
    names = linear + [alias for n in expert_weights(base) if experts for alias in _aliases(base, n)]
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
            f"{linear[0]!r}; or write all-linear)"
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


def _aliases(base: torch.nn.Module, weight: str) -> list[str]:
    """Returns the name of an experts' parameter, and the names of the matrices that are fused into it."""
    layer, _, attribute = weight.rpartition(".")
    return [weight, *(f"{layer}.{name}" for name, fused in fused_names(base).items() if fused == attribute)]


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
