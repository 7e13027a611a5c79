"""Conversion of a model on the meta device into ZeRO-3's slices, before any of its values exists.

DeepSpeed can only cut real tensors. So each parameter in turn gets uninitialised memory, is cut by DeepSpeed's own
conversion, and is freed. Slices are equal parts of the flattened parameter; the last ones end in padding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from trainer.nf4 import allocated
from trainer.strategies.base import ShardSlice


def cut(deepspeed: Any, model: torch.nn.Module, config: Mapping[str, Any], device: torch.device) -> None:
    """Replaces every parameter by one that DeepSpeed has cut, with undefined values. Every rank calls it."""
    zero = deepspeed.zero.Init(module=torch.nn.Module(), config_dict_or_path=dict(config), mem_efficient_linear=False)
    made: dict[int, torch.nn.Parameter] = {}
    kept = []  # keeps the replaced parameters alive: `id` is unique only among live objects
    for module in model.modules():
        for name, old in list(module._parameters.items()):
            if old is None:
                continue
            if id(old) not in made:
                made[id(old)] = allocated(module, old, device)
                kept.append(old)
                # Not through `Init` with a module: it would first broadcast every parameter from rank 0.
                zero._convert_to_deepspeed_param(made[id(old)])
                made[id(old)].partition()  # type: ignore[attr-defined]
            module._parameters[name] = made[id(old)]


def pieces(model: torch.nn.Module, rank: int) -> list[ShardSlice]:
    return [_piece(name, parameter, rank) for name, parameter in model.named_parameters()]


def _piece(name: str, parameter: Any, rank: int) -> ShardSlice:
    shape, mine = torch.Size(parameter.ds_shape), parameter.ds_tensor
    start = min(rank * mine.numel(), shape.numel())
    stop = min(start + mine.numel(), shape.numel())
    mine[stop - start :] = 0  # norms are computed over the padding too
    return ShardSlice(name, shape, start, stop, mine.as_subclass(torch.Tensor)[: stop - start])


def gathered(parameter: Any, rank: int, device: torch.device) -> torch.Tensor:
    """Returns the full parameter on ``device``. Collective."""
    piece = _piece("", parameter, rank)
    size = parameter.ds_tensor.element_size()
    # Summed as bytes: the values may be packed codes, which cannot be summed as numbers.
    whole = torch.zeros(math.prod(piece.shape) * size, dtype=torch.uint8, device=device)
    if piece.local.numel():
        whole[piece.start * size : piece.stop * size] = piece.local.view(torch.uint8).to(device)
    dist.all_reduce(whole)
    return whole.view(piece.local.dtype).view(piece.shape)
