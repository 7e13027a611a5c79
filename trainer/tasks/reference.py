"""The reference that a trained adapter is compared with: the same model with its adapter switched off."""

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


def _mark(trained: list[tuple[torch.nn.Parameter, bool]]) -> None:
    for parameter, wanted in trained:
        parameter.requires_grad_(wanted)
