"""Transfer of a micro-batch's arrays to the device, and the boundaries of the samples in packs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

VARLEN = "muster_varlen"
SEGMENTING = ("flash_attention_2", VARLEN)
"""Attention kernels, by transformers' names, that take the boundaries of samples as arguments."""


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copies an array to ``device``; the host does not wait for a CUDA device."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda" or not tensor.numel():
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)  # only a copy from pinned memory is asynchronous


def model_inputs(
    input_ids: np.ndarray,
    position_ids: np.ndarray,
    device: torch.device,
    kernel: str | None = None,
    packed: bool = False,
) -> dict[str, Any]:
    """Returns a causal language model's arguments for rows [B, L]. ``kernel``: its attention, by transformers' name;
    ``packed``: a row may hold several samples."""
    return {
        "input_ids": to_device(input_ids, device),
        "position_ids": to_device(position_ids, device),
        "use_cache": False,
        **(segments(position_ids, device, kernel, packed=packed) if kernel in SEGMENTING else {}),
    }


def sample_bounds(position_ids: np.ndarray) -> np.ndarray:
    """Returns the start of each sample in the flattened rows [B, L], and their end; each pad is a sample of its own."""
    return np.append(np.flatnonzero(position_ids.ravel() == 0), position_ids.size).astype(np.int32)


def segments(position_ids: np.ndarray, device: torch.device, kernel: str, *, packed: bool) -> dict[str, Any]:
    """Returns the keyword arguments for the boundaries of the samples in the flattened rows [B, L].

    Packs have transformers' names for them. Rows of one sample do not: linear attention reads these names too, and
    refuses them where its kernel for packs is not installed."""
    bounds = sample_bounds(position_ids)
    begins, longest = to_device(bounds, device), int(np.diff(bounds).max())
    if packed:
        return {"cu_seq_lens_q": begins, "cu_seq_lens_k": begins, "max_length_q": longest, "max_length_k": longest}
    return {"sample_bounds": (begins, longest)} if kernel == VARLEN else {}
