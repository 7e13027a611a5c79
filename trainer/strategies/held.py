"""The forms in which an optimizer holds a parameter.

Most optimizers take the strategy's own parameters, sharded ones of torch (DTensor) included (`Itself`). Kernels that
read memory directly get the elements of a rank as a plain tensor (`Shard`). An update that depends on a complete matrix
is computed by one rank, which holds the state of that matrix and sends the result to the others (`Complete`), so that
it is the same on any number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch


class HeldPart(NamedTuple):
    """The elements of a flattened parameter that an optimizer updates on this rank; ``numel`` may be 0. ``saved``: this
    rank stores the state of them; other ranks may have the same elements."""

    start: int
    numel: int
    saved: bool = True


class Itself:
    """The strategy's own parameter."""

    part: HeldPart | None = None
    """None: the strategy's functions convert the state, as they do with the parameter."""

    source: Any
    """The strategy's parameter; under FSDP2 a DTensor."""

    def __init__(self, parameter: torch.nn.Parameter) -> None:
        self.source = self.parameter = parameter

    def zero_gradient(self) -> None:
        self.parameter.grad = torch.zeros_like(self.parameter)

    def close(self) -> None:
        self.parameter.grad = None


class Shard(Itself):
    """The elements of a sharded parameter that are on this rank, as a plain tensor in the same memory."""

    def __init__(self, source: Any, part: HeldPart) -> None:
        self.source, self.part = source, part
        self.parameter = torch.nn.Parameter(source.to_local().detach())

    def take(self) -> None:
        # Again before each update: FSDP2 moves its shards to other memory at the first forward.
        self.parameter.data = self.source.to_local().detach()
        if self.source.grad is not None and self.parameter.numel():
            self.parameter.grad = self.source.grad.to_local()

    def zero_gradient(self) -> None:
        self.parameter.data = self.source.to_local().detach()
        if self.parameter.numel():
            self.parameter.grad = torch.zeros_like(self.parameter)


class Complete(Itself):
    """All of a parameter, on the rank that updates it, during the update. ``owner``: that rank."""

    def __init__(self, source: Any, owner: int, mine: bool, device: torch.device) -> None:
        self.source, self.owner, self.mine = source, owner, mine
        self.part = HeldPart(0, math.prod(source.shape) if mine else 0, mine)
        self.parameter = torch.nn.Parameter(torch.empty((0,) * source.ndim, dtype=source.dtype, device=device))

    def take(self, values: torch.Tensor, gradient: torch.Tensor) -> None:
        self.parameter.data, self.parameter.grad = values, gradient

    def zero_gradient(self) -> None:
        if self.mine:
            zeros = torch.zeros(self.source.shape, dtype=self.source.dtype, device=self.parameter.device)
            self.take(zeros, torch.zeros_like(zeros))

    def close(self) -> None:
        self.parameter.grad = None
        self.parameter.data = self.parameter.data.new_empty((0,) * self.source.ndim)


def owners(parameters: Mapping[str, torch.Tensor], ranks: int) -> dict[str, int]:
    """Assigns each parameter to a rank, the largest first to the rank with the fewest elements."""
    loads = [0] * ranks
    found: dict[str, int] = {}
    for name in sorted(parameters, key=lambda n: (-math.prod(parameters[n].shape), n)):
        found[name] = loads.index(min(loads))
        loads[found[name]] += math.prod(parameters[name].shape)
    return found
