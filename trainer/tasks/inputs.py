"""Transfer of a micro-batch's arrays to the device, and the boundaries of the samples in packs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

SEGMENTING = ("flash_attention_2", "muster_varlen")
"""Attention kernels, by transformers' names, that take the boundaries of samples as arguments."""


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copies an array to ``device``; the host does not wait for a CUDA device."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda" or not tensor.numel():
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)  # only a copy from pinned memory is asynchronous


def segments(position_ids: np.ndarray, device: torch.device) -> dict[str, Any]:
    """Returns transformers' keyword arguments for the boundaries of the samples in the flattened packs [B, L]. A sample
    begins at each position 0, so that a pad is a sample of its own."""
    bounds = np.append(np.flatnonzero(position_ids.ravel() == 0), position_ids.size).astype(np.int32)
    begins, longest = to_device(bounds, device), int(np.diff(bounds).max())
    return {"cu_seq_lens_q": begins, "cu_seq_lens_k": begins, "max_length_q": longest, "max_length_k": longest}
