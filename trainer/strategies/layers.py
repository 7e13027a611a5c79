"""Decoder layers of a model: the unit in which parameters are gathered, computed and freed."""

from __future__ import annotations

import torch

from trainer.errors import InputError


def decoder_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Returns the repeated blocks of a transformer: of the ModuleLists whose entries are of one class, the entries of
    the one with the most parameters.

    Raises InputError when there is none: with only the root sharded, a step would gather the whole model."""
    lists: list[torch.nn.ModuleList] = [
        m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len({type(x) for x in m}) == 1
    ]
    if not lists:
        raise InputError(
            f"no list of decoder layers in {type(model).__name__}, so that it cannot be sharded; use strategy.kind=ddp"
        )
    return list(max(lists, key=lambda layers: sum(p.numel() for layer in layers for p in layer.parameters())))
