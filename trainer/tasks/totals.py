"""Named sums over the micro-batches of a rank, and then, as one list of numbers, over the ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch


class Totals:
    """Accumulates named sums. Every rank adds the same names and shapes in the same order, so that the lists of all
    ranks can be added element-wise."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, sums: Mapping[str, torch.Tensor]) -> None:
        for name, value in sums.items():
            value = value.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def numbers(self) -> list[float]:
        """Returns all sums as one list. Waits for the device once."""
        if not self._sums:
            return []
        numbers: list[float] = torch.cat([value.reshape(-1) for value in self._sums.values()]).tolist()
        return numbers

    def named(self, numbers: Sequence[float]) -> dict[str, torch.Tensor]:
        """Returns ``numbers``, summed over the ranks, as tensors by name: float64 on the CPU."""
        shapes = [value.shape for value in self._sums.values()]
        parts = torch.tensor(numbers, dtype=torch.float64).split([shape.numel() for shape in shapes])
        return {name: part.reshape(shape) for name, part, shape in zip(self._sums, parts, shapes, strict=True)}
