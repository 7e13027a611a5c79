"""The random numbers of one run's micro-batch, where the layers of several runs draw in turns from torch's generators.

A run alone seeds the generators for each micro-batch, and the dropout of its LoRA layers draws from them, layer by
layer. Here the state of the generators is kept for each run and put back before its layers draw, so that it drops the
same elements."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class RandomState:
    """Begins with the state of the generators as it is now. ``keeps``: the backward computes layers again, which then
    have to draw the same numbers."""

    def __init__(self, device: torch.device, *, keeps: bool) -> None:
        self._device, self._keeps = device, keeps
        self._now: list[torch.Tensor] | None = None
        self._first = self._read()
        self._before: dict[str, list[torch.Tensor]] = {}

    @contextmanager
    def drawn(self, name: str, *, again: bool) -> Iterator[None]:
        """Lets the layer ``name`` draw from the run's random numbers inside the context. ``again``: the same numbers as
        the last time."""
        now = self._before[name] if again else self._now or self._first
        if self._keeps and not again:
            self._before[name] = now
        self._write(now)
        yield
        if not again:
            self._now = self._read()

    def leave(self) -> None:
        """Sets the generators to the state in which the run alone would have left them."""
        if self._now is not None:
            self._write(self._now)

    def _read(self) -> list[torch.Tensor]:
        states = [torch.get_rng_state()]
        return [*states, torch.cuda.get_rng_state(self._device)] if self._device.type == "cuda" else states

    def _write(self, states: list[torch.Tensor]) -> None:
        torch.set_rng_state(states[0])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(states[1], self._device)
