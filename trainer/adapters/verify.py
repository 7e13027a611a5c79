"""Verification of a saved adapter: its file is read back before the checkpoint is committed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from trainer.adapters.base import Adapter
from trainer.errors import CorruptObject


def verify_saved(
    adapter: Adapter, shapes: Mapping[str, tuple[int, ...]], folder: Path, *, updated: bool = True
) -> None:
    """Compares the file in ``folder`` with the expected names and shapes.

    Raises CorruptObject when a tensor is missing, unexpected, of another shape, not of a floating dtype or not finite,
    or when all tensors that training should have moved away from zero are still zero (a gather that saved nothing).
    ``updated``: True if the optimizer has taken a step; in float16, steps that overflow are skipped.
    """
    from safetensors import safe_open

    path = folder / adapter.weights_file
    learnt: list[bool] = []
    with safe_open(path, framework="pt") as file:
        got, want = set(file.keys()), set(shapes)
        if got != want:
            raise CorruptObject(
                f"{path.name}: {len(want - got)} tensors are missing {sorted(want - got)[:3]}, "
                f"{len(got - want)} are foreign {sorted(got - want)[:3]}"
            )
        for name, shape in shapes.items():
            tensor = file.get_tensor(name)
            _check_tensor(path, name, tensor, shape)
            if adapter.starts_at_zero(name):
                learnt.append(bool(tensor.any()))
    if updated and learnt and not any(learnt):
        raise CorruptObject(f"{path.name}: all {len(learnt)} tensors that training moves away from zero are zero")


def _check_tensor(path: Path, name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise CorruptObject(f"{path.name}: {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
    if not tensor.is_floating_point():
        raise CorruptObject(f"{path.name}: {name} has dtype {tensor.dtype}, expected a floating-point one")
    if not torch.isfinite(tensor).all():
        raise CorruptObject(f"{path.name}: {name} holds values that are not finite")
