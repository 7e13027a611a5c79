"""Where a model repeats itself: what is gathered, computed and freed as one."""

from __future__ import annotations

import torch

from trainer.errors import InputError


def decoder_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The repeated blocks of a transformer: the members of its longest ModuleList whose entries are of one class.

    Raises InputError when there is none: then nothing but the root could be sharded, and a step would gather it all."""
    lists: list[torch.nn.ModuleList] = [
        m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len({type(x) for x in m}) == 1
    ]
    if not lists:
        raise InputError(
            f"no list of decoder layers in {type(model).__name__}, so that it cannot be sharded; use strategy.kind=ddp"
        )
    return max((list(m) for m in lists), key=_size)


def _size(layers: list[torch.nn.Module]) -> int:
    return sum(p.numel() for layer in layers for p in layer.parameters())
