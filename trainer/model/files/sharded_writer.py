"""Writes weights one after the other into safetensors files of bounded size, and their index."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

Put = Callable[[str, Path], Any]
"""Stores a file, given its name and its temporary path."""


class WeightFiles:
    """A series of weight files; ``put`` stores each when it is complete. Memory: one file of about ``file_bytes``."""

    def __init__(self, put: Put, file_bytes: int) -> None:
        self._put, self._file_bytes = put, file_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._weight_map: dict[str, str] = {}
        self._files = 0

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._pending.update(tensors)
        if sum(t.numel() * t.element_size() for t in self._pending.values()) >= self._file_bytes:
            self._flush()

    def index(self) -> dict[str, Any]:
        """Writes the last file and returns the content of ``model.safetensors.index.json``."""
        if self._pending:
            self._flush()
        return {"metadata": {}, "weight_map": self._weight_map}

    def _flush(self) -> None:
        from safetensors.torch import save_file

        self._files += 1
        name = f"model-{self._files:05d}.safetensors"
        with tempfile.TemporaryDirectory(prefix="muster-weights-") as scratch:
            save_file(self._pending, Path(scratch, name), {"format": "pt"})
            self._put(name, Path(scratch, name))
        self._weight_map.update(dict.fromkeys(self._pending, name))
        self._pending.clear()
