"""DDP whose result does not depend, to the last bit, on the number of ranks (``exact: true``).

Floating-point addition is not associative: summing the micro-batches' gradients in another grouping, as another number
of ranks does, changes the last bits. So each micro-batch's gradient is rounded to a whole number of 2^-40 and the
whole numbers are added, on the rank and over the ranks: integer addition is associative (the idea of reproducible
summation; Demmel & Nguyen 2013, doi:10.1109/ARITH.2013.9). What a micro-batch itself computes is the same on any rank,
since its data and its random numbers are.

Cost: no overlap with the backward, eight bytes per trained parameter, and twice the bytes on the network.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from trainer.errors import NonFiniteLoss
from trainer.strategies.base import Strategy

FRACTION_BITS = 40
LIMIT = 2.0 ** (62 - FRACTION_BITS)
"""The largest sum that the whole numbers hold: 4 million, where gradients of a mean loss are around 1."""


class ExactDDP(Strategy):
    averages = False

    def wrap(self, model: torch.nn.Module) -> torch.nn.Module:
        self._sums: dict[str, torch.Tensor] = {}
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
            self._sums[name] += fixed_point(parameter.grad)
            parameter.grad = None

    def _exchange(self) -> None:
        for name, parameter in self.trainable().items():
            whole = self._sums.pop(name)
            dist.all_reduce(whole)
            parameter.grad = (whole.double() * 2.0**-FRACTION_BITS).to(parameter.dtype)

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def spread(self, whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return whole.to(device=like.device, dtype=like.dtype)

    def wrapped(self) -> list[str]:
        return [""]


def fixed_point(values: torch.Tensor) -> torch.Tensor:
    """``values`` in whole numbers (int64) of 2^-40. Raises NonFiniteLoss for what they cannot hold."""
    largest = float(values.abs().max()) if values.numel() else 0.0
    if not largest < LIMIT:
        raise NonFiniteLoss(
            f"a gradient of {largest:g} is more than exact: true can add ({LIMIT:g}); lower optimizer.lr"
        )
    return torch.round(values.double() * 2.0**FRACTION_BITS).to(torch.int64)
