"""The same model with its trained adapter switched off (the reference that it is compared with), or another one on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """peft also marks what it switches off as not trained, and FSDP2 keeps for good what it found in the first forward,
    which may be this one; so the marks are put back at once."""
    trained = [(p, p.requires_grad) for p in model.parameters()]
    with model.disable_adapter():
        _mark(trained)
        yield
    _mark(trained)


@contextmanager
def adapter_of(model: Any, name: str) -> Iterator[None]:
    """Another adapter in the place of the trained one, which is back afterwards; nothing else is trained meanwhile."""
    trained, before = [(p, p.requires_grad) for p in model.parameters()], model.active_adapter
    model.base_model.set_adapter(name)
    _mark(trained)
    yield
    model.base_model.set_adapter(before)
    _mark(trained)


def _mark(trained: list[tuple[torch.nn.Parameter, bool]]) -> None:
    for parameter, wanted in trained:
        parameter.requires_grad_(wanted)
