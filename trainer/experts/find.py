"""Finds the experts and routers of a model by their shapes.

transformers keeps the matrices of a layer's E experts in one parameter of shape [E, out, in] or [E, in, out], in a
module of its own. Neither LoRA on ``nn.Linear`` nor bitsandbytes' conversion sees them. The configuration names E,
under a key that differs between architectures and contains "expert".
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from trainer.experts.packed import packed_in


class ExpertWeight(NamedTuple):
    """The matrices of a layer's experts. ``owner``: the module whose parameter ``attribute`` they are; ``shape``: that
    of the unpacked parameter, with the experts first."""

    owner: torch.nn.Module
    attribute: str
    shape: torch.Size


def expert_weights(model: torch.nn.Module) -> dict[str, ExpertWeight]:
    """Returns the experts' weights of a model without an adapter, packed or not, by their names in it."""
    counts = _expert_counts(model)
    found: dict[str, ExpertWeight] = {}
    for name, module in model.named_modules():
        stacks = _stacks(module)
        if any(shape[0] in counts for shape in stacks.values()):
            found |= {f"{name}.{a}": ExpertWeight(module, a, shape) for a, shape in stacks.items()}
    return found


def routers(model: torch.nn.Module) -> set[str]:
    """Returns the names of the linear layers that choose experts.

    A router stands next to the experts: it is called so, or is a linear layer with one output for each expert. Where no
    experts are found (DBRX keeps theirs in matrices), it has both."""
    counts = _expert_counts(model)
    linear = [(name, m) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    found = {name for name, m in linear if "router" in name and m.out_features in counts}
    # The modules that hold a layer's experts: in one parameter, or as a list of modules.
    holders = {name.rpartition(".")[0] for name in expert_weights(model)}
    lists = {n for n, m in model.named_modules() if isinstance(m, torch.nn.ModuleList) and len(m) in counts}
    holders |= {name for name in lists if name.rpartition(".")[2] == "experts"}
    for block in {name.rpartition(".")[0] for name in holders}:
        for child_name, child in model.get_submodule(block).named_children():
            inside = f"{block}.{child_name}" if block else child_name
            layers = {
                f"{inside}.{n}" if n else inside: m for n, m in child.named_modules() if isinstance(m, torch.nn.Linear)
            }
            alone = len(layers) == 1 and next(iter(layers.values())).out_features in counts
            if "router" in child_name or alone:
                found |= set(layers)
    return found


def is_mixture(model: Any) -> bool:
    """Returns True if the configuration has experts. Every layer of such a model may still be a dense one."""
    return bool(_expert_counts(model))


def _expert_counts(model: Any) -> set[int]:
    config = getattr(model, "config", None)
    return set() if config is None else expert_counts(config.get_text_config())


def expert_counts(text: Any) -> set[int]:
    """Returns the numbers of experts in a text model's configuration."""
    settings = text.to_dict()
    parts = [settings, *(part for name, part in settings.items() if name.endswith("_config") and part)]
    named = [(k, v) for part in parts for k, v in part.items() if "expert" in k and "per_tok" not in k]
    return {v for _, v in named if type(v) is int and v > 1}


def experts_per_token(text: Any) -> int:
    """Returns how many experts of a layer a token uses, by a text model's configuration; 1 if that does not tell."""
    told = {k: v for k, v in text.to_dict().items() if type(v) is int}
    return max((v for k, v in told.items() if ("expert" in k and "per_tok" in k) or k == "moe_topk"), default=1)


def _stacks(module: torch.nn.Module) -> dict[str, torch.Size]:
    """Returns the shapes of the module's own parameters with three dimensions, by attribute."""
    if isinstance(module, torch.nn.Conv1d | torch.nn.ConvTranspose1d):
        return {}
    packed = {attribute: packing.shape for attribute, packing in packed_in(module).items()}
    plain = {a: p.shape for a, p in module.named_parameters(recurse=False) if p.dim() == 3}
    return {**plain, **packed}
