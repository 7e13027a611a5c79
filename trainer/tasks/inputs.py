"""Arrays of a micro-batch on their way to the device, and what packs say of their samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

SEGMENTING = ("flash_attention_2", "muster_varlen")
"""Kernels of attention, by transformers' names, that are told where samples begin."""


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Without waiting where that can be: a copy from pinned memory runs in the device's own order of work."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda" or not tensor.numel():
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def segments(position_ids: np.ndarray, device: torch.device) -> dict[str, Any]:
    """The keyword arguments by which transformers tells kernels of attention where each sample of the flattened packs
    [B, L] begins: at each position 0, so that a pad is a sample of its own."""
    bounds = np.append(np.flatnonzero(position_ids.ravel() == 0), position_ids.size).astype(np.int32)
    begins, longest = to_device(bounds, device), int(np.diff(bounds).max())
    return {"cu_seq_lens_q": begins, "cu_seq_lens_k": begins, "max_length_q": longest, "max_length_k": longest}
