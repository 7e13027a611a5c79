"""A model on the meta device, cut into ZeRO-3's slices before any of its values exists.

DeepSpeed cuts real tensors: each parameter gets memory that nobody has touched, is cut by DeepSpeed's own conversion,
and is freed, one after the other. Slices are equal parts of the flattened parameter; the last ones end in padding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from trainer.strategies.base import ShardSlice


def cut(deepspeed: Any, model: torch.nn.Module, config: Mapping[str, Any], device: torch.device) -> None:
    """Replaces every parameter by one that DeepSpeed has cut, its values undefined. Every rank calls it."""
    zero = deepspeed.zero.Init(module=torch.nn.Module(), config_dict_or_path=dict(config), mem_efficient_linear=False)
    made: dict[int, torch.nn.Parameter] = {}
    kept = []  # what is replaced lives until the end: an identity is its own no longer than that
    for module in model.modules():
        for name, old in list(module._parameters.items()):
            if old is None:
                continue
            if id(old) not in made:
                made[id(old)] = _real(module, old, device)
                kept.append(old)
                # Not through `Init` with a module: it sends every parameter from rank 0 to all others first.
                zero._convert_to_deepspeed_param(made[id(old)])
                made[id(old)].partition()  # type: ignore[attr-defined]
            module._parameters[name] = made[id(old)]


def _real(module: Any, old: Any, device: torch.device) -> torch.nn.Parameter:
    """``old`` in untouched memory."""
    data = torch.empty(old.shape, dtype=old.dtype, device=device)
    if type(old).__name__ != "Params4bit":
        return torch.nn.Parameter(data, requires_grad=old.requires_grad)
    names = ("quant_state", "blocksize", "compress_statistics", "quant_type", "quant_storage", "bnb_quantized")
    settings = {name: getattr(old, name) for name in names}
    packed: torch.nn.Parameter = type(old)(data, requires_grad=False, module=module, **settings)
    return packed


def pieces(model: torch.nn.Module, rank: int) -> list[ShardSlice]:
    return [_piece(name, parameter, rank) for name, parameter in model.named_parameters()]


def _piece(name: str, parameter: Any, rank: int) -> ShardSlice:
    shape, mine = torch.Size(parameter.ds_shape), parameter.ds_tensor
    start = min(rank * mine.numel(), shape.numel())
    stop = min(start + mine.numel(), shape.numel())
    mine[stop - start :] = 0  # the padding is summed with the rest where norms are taken
    return ShardSlice(name, shape, start, stop, mine.as_subclass(torch.Tensor)[: stop - start])


def gathered(parameter: Any, rank: int, device: torch.device) -> torch.Tensor:
    """Collective. The whole parameter on ``device``, put together byte by byte: packed codes are no numbers."""
    piece = _piece("", parameter, rank)
    size = parameter.ds_tensor.element_size()
    whole = torch.zeros(math.prod(piece.shape) * size, dtype=torch.uint8, device=device)
    if piece.local.numel():
        whole[piece.start * size : piece.stop * size] = piece.local.view(torch.uint8).to(device)
    dist.all_reduce(whole)
    return whole.view(piece.local.dtype).view(piece.shape)
