"""Decoder layers of a model: the unit in which parameters are gathered, computed and freed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch.nn import ModuleDict, ModuleList

from trainer.errors import InputError
from trainer.modules import text_model


def decoder_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Returns the repeated blocks of the text model: the entries of the ModuleList with the most parameters, of one
    class or several, and of the other lists that have entries of these classes only.

    Raises InputError when there is none: with only the root sharded, a step would gather the whole model."""
    layers = _blocks(text_model(model).modules())
    if not layers:
        raise InputError(
            f"no list of decoder layers in {type(model).__name__}, so that it cannot be sharded; use strategy.kind=ddp"
        )
    return layers


def separate_blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Returns the decoder layers, and the layers of a tower for images or sound, that share no parameter with any other
    part of the model. Of a layer that does (blocks that several layers use), returns its submodules that share none."""
    everywhere, text = _uses(model), {id(m) for m in text_model(model).modules()}

    def separate(block: torch.nn.Module) -> bool:
        uses = _uses(block)
        return bool(uses) and all(everywhere[parameter] == count for parameter, count in uses.items())

    found: list[torch.nn.Module] = []
    for layer in (*decoder_layers(model), *_blocks(m for m in model.modules() if id(m) not in text)):
        parts = [m for m in layer.children() if not isinstance(m, ModuleList | ModuleDict)]  # these have no forward
        found += [layer] if separate(layer) else filter(separate, parts)
    return found


def _blocks(modules: Iterable[torch.nn.Module]) -> list[torch.nn.Module]:
    lists = [m for m in modules if isinstance(m, ModuleList) and _size(m)]
    classes = {type(layer) for layer in max(lists, key=_size, default=ModuleList())}
    return [layer for found in lists if {type(layer) for layer in found} <= classes for layer in found]


def _size(layers: ModuleList) -> int:
    # ZeRO-3 leaves empty parameters behind, with their number of elements in `ds_numel`.
    return sum(getattr(p, "ds_numel", p.numel()) for p in layers.parameters())


def _uses(module: torch.nn.Module) -> Counter[int]:
    """Counts the places of each parameter, by its identity."""
    return Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
