"""NF4 with double quantisation of a part of a weight, bit-identical to bitsandbytes' quantisation of the full weight.

NF4 (Dettmers et al. 2023, arXiv:2305.14314) maps each block of 64 consecutive elements to 4-bit codes and one absmax;
the absmax values of all blocks, minus their mean, are then quantised to 8 bits in blocks of 256. A rank that keeps some
of the packed bytes reads the elements that they encode, widened to complete blocks. The absmax values of all ranks are
combined before they are quantised, since their mean is over all blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

BLOCK = 64
NESTED_BLOCK = 256
CHUNK = 2**20
"""Elements that are quantised at a time: each needs about 20 bytes of memory."""

Read = Callable[[int, int], torch.Tensor]


def elements_of(start: int, stop: int, itemsize: int, numel: int) -> tuple[int, int]:
    """Returns the weight's elements in storage elements ``start`` to ``stop`` of ``itemsize`` bytes, two codes a
    byte."""
    return min(numel, 2 * start * itemsize), min(numel, 2 * stop * itemsize)


def block_chunks(first: int, last: int, numel: int, chunk: int = CHUNK) -> Iterator[tuple[int, int]]:
    """Yields elements ``first`` to ``last``, widened to complete blocks, in runs of ``chunk`` (a multiple of 64)."""
    if first >= last:
        return
    end = min(numel, math.ceil(last / BLOCK) * BLOCK)
    for start in range(first // BLOCK * BLOCK, end, chunk):
        yield start, min(end, start + chunk)


def quantise_piece(
    read: Read, numel: int, start: int, stop: int, local: torch.Tensor, device: torch.device, chunk: int = CHUNK
) -> torch.Tensor:
    """Fills ``local`` (flat, of the storage type) with storage elements ``start`` to ``stop`` of the packed weight.

    ``read(a, b)`` returns the weight's elements ``a`` to ``b`` on ``device``, in the type that is quantised. Returns
    absmax [blocks of the full weight] float32 on ``device``, with zeros for the blocks of other pieces."""
    from bitsandbytes import functional

    absmax = torch.zeros(math.ceil(numel / BLOCK), dtype=torch.float32, device=device)
    first, last = elements_of(start, stop, local.element_size(), numel)
    target = local.view(torch.uint8) if local.numel() else local
    for a, b in block_chunks(first, last, numel, chunk):
        packed, state = functional.quantize_4bit(read(a, b), blocksize=BLOCK, quant_type="nf4")
        absmax[a // BLOCK : math.ceil(b / BLOCK)] = state.absmax
        codes = packed.view(-1)
        # ``a`` is a multiple of 64 and ``first`` is even (the piece begins at a full byte): no byte is split.
        begin, end = max(a, first) // 2, min(math.ceil(b / 2), math.ceil(last / 2))
        target[begin - first // 2 : end - first // 2] = codes[begin - a // 2 : end - a // 2]
    return absmax


def gather_absmax(absmax: torch.Tensor) -> torch.Tensor:
    """Collective, in place: each block's absmax from the rank that computed it. Two ranks that share a block have the
    same value."""
    dist.all_reduce(absmax, dist.ReduceOp.MAX)
    return absmax


def nested_state(absmax: torch.Tensor, shape: torch.Size, dtype: torch.dtype) -> Any:
    """Returns the state of bitsandbytes' ``quantize_4bit(compress_statistics=True)`` for these absmax values."""
    from bitsandbytes import functional

    offset = absmax.mean()
    nested, state = functional.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
    return functional.QuantState(
        absmax=nested,
        shape=shape,
        dtype=dtype,
        blocksize=BLOCK,
        code=functional.get_4bit_type("nf4", device=absmax.device),
        quant_type="nf4",
        offset=offset,
        state2=state,
    )


def quantise_4bit(weight: torch.Tensor, storage: torch.dtype) -> tuple[torch.Tensor, Any]:
    """Quantises a tensor on any device (meta included) to bitsandbytes' NF4 with double quantisation. ``storage``: the
    type that holds the packed bytes."""
    from bitsandbytes import functional

    # bitsandbytes caches its table of 8-bit codes at the first call; made on the meta device, it would have no values.
    functional.name2qmap.setdefault("dynamic", functional.create_dynamic_map())
    packed, state = functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4", quant_storage=storage)
    return packed, state


def full_absmax(state: Any) -> torch.Tensor:
    """Returns the absmax of each block, float32 [blocks]."""
    from bitsandbytes import functional

    absmax: torch.Tensor = state.absmax
    if not state.nested:
        return absmax
    absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    return absmax


def dequantise_block(codes: torch.Tensor, absmax: torch.Tensor, state: Any, first: int, last: int) -> torch.Tensor:
    """Returns elements ``first`` to ``last`` of a packed tensor, flat; both are multiples of 64. ``codes``: its bytes;
    ``absmax``: that of all blocks."""
    from bitsandbytes import functional

    part = functional.QuantState(
        absmax=absmax[first // BLOCK : last // BLOCK],
        shape=torch.Size((last - first,)),
        dtype=state.dtype,
        blocksize=BLOCK,
        code=state.code,
        quant_type="nf4",
    )
    values: torch.Tensor = functional.dequantize_4bit(codes[first // 2 : last // 2].view(-1, 1), part)
    return values


def dequantise_rows(packed: torch.Tensor, state: Any, first: int, last: int) -> Iterator[torch.Tensor]:
    """Yields rows ``first`` to ``last`` of the full ``packed`` weight, dequantised, some rows at a time."""
    from bitsandbytes import functional

    columns = state.shape[1]
    if columns % BLOCK:  # a row may begin inside a block; such weights are small
        yield functional.dequantize_4bit(packed, state)[first:last]
        return
    absmax, codes = full_absmax(state), packed.view(torch.uint8).view(-1)
    step = max(1, CHUNK // columns)
    for row in range(first, last, step):
        end = min(last, row + step)
        yield dequantise_block(codes, absmax, state, row * columns, end * columns).view(-1, columns)


def allocated(module: Any, old: Any, device: torch.device) -> torch.nn.Parameter:
    """Returns a parameter like ``old``, of this module, in uninitialised memory on ``device``."""
    data = torch.empty(old.shape, dtype=old.dtype, device=device)
    if type(old).__name__ != "Params4bit":
        return torch.nn.Parameter(data, requires_grad=old.requires_grad)
    names = ("quant_state", "blocksize", "compress_statistics", "quant_type", "quant_storage", "bnb_quantized")
    settings = {name: getattr(old, name) for name in names}
    packed: torch.nn.Parameter = type(old)(data, requires_grad=False, module=module, **settings)
    return packed
