"""Contexts in which a model's trained adapter is switched off (the reference model), or replaced by another one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """Switches the trained adapter off inside the context."""
    trained = [(p, p.requires_grad) for p in model.parameters()]
    with model.disable_adapter():
        # peft clears `requires_grad` of the adapter. Restore it before the forward: FSDP2 keeps the flags that it finds
        # in its first forward, which may be this one.
        _mark(trained)
        yield
    _mark(trained)


@contextmanager
def adapter_of(model: Any, name: str) -> Iterator[None]:
    """Activates the adapter ``name`` instead of the trained one inside the context. `requires_grad` of all parameters
    stays unchanged."""
    trained, before = [(p, p.requires_grad) for p in model.parameters()], model.active_adapter
    model.base_model.set_adapter(name)
    _mark(trained)
    yield
    model.base_model.set_adapter(before)
    _mark(trained)


def _mark(trained: list[tuple[torch.nn.Parameter, bool]]) -> None:
    for parameter, wanted in trained:
        parameter.requires_grad_(wanted)
