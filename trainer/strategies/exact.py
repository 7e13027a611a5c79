"""DDP whose result is bitwise independent of the number of ranks (``exact: true``).

Floating-point addition is not associative: another number of ranks sums the micro-batches' gradients in another
grouping, which changes the last bits. So each micro-batch's gradient is rounded to fixed-point integers with a unit of
2^-40, and the integers are added, on the rank and over the ranks. Integer addition is associative (the idea of
reproducible summation; Demmel & Nguyen 2013, doi:10.1109/ARITH.2013.9). The gradient of a micro-batch is the same on
any rank, because its data and its random numbers are the same.

Cost: no overlap with the backward, eight bytes per trained parameter, and twice the bytes on the network.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from trainer.strategies.base import Strategy

FRACTION_BITS = 40
LIMIT = 2.0 ** (63 - FRACTION_BITS - 13)
"""Upper limit of the entries of a micro-batch's gradient: 1,024; those of a mean loss are around 1. 8,192 micro-batches
can be added without overflow."""


class ExactDDP(Strategy):
    averages_gradients = False
    gradient_size = 8

    def wrap(self, model: torch.nn.Module) -> torch.nn.Module:
        self._sums: dict[str, torch.Tensor] = {}
        self._unfit = torch.zeros((), device=self.world.device)
        return model

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        yield
        for name, parameter in self.trainable().items():
            self._add(name, parameter)
        if last:
            self._exchange()

    def _add(self, name: str, parameter: torch.nn.Parameter) -> None:
        if name not in self._sums:
            self._sums[name] = torch.zeros(parameter.shape, dtype=torch.int64, device=parameter.device)
        if parameter.grad is not None:
            whole = fixed_point(parameter.grad)
            if whole is None:
                self._unfit.fill_(1)
            else:
                self._sums[name] += whole
            parameter.grad = None

    def _exchange(self) -> None:
        """Adds the integers over the ranks and sets the gradients. Collective: every rank calls it.

        If a gradient was out of range on one rank, all gradients become nan on all ranks; the loop then reports the
        step and stops."""
        dist.all_reduce(self._unfit)
        unfit = bool(self._unfit)
        self._unfit.zero_()
        for name, parameter in self.trainable().items():
            whole = self._sums.pop(name)
            dist.all_reduce(whole)
            gradient = (whole.double() * 2.0**-FRACTION_BITS).to(parameter.dtype)
            parameter.grad = gradient.fill_(float("nan")) if unfit else gradient

    def full_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def shard_like(self, whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return whole.to(device=like.device, dtype=like.dtype)

    def wrapped(self) -> list[str]:
        return [""]


def fixed_point(values: torch.Tensor) -> torch.Tensor | None:
    """Returns ``values`` as fixed-point integers (int64, unit 2^-40); None if one of them is nan or not below
    ``LIMIT``."""
    if values.numel() and not float(values.abs().max()) < LIMIT:
        return None
    return torch.round(values.double() * 2.0**FRACTION_BITS).to(torch.int64)
