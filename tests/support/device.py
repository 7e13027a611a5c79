"""What tests and benchmarks on a CUDA device share. All of it but the peak of memory works on a CPU as well."""

from __future__ import annotations

import torch

HAS_GPU = torch.cuda.is_available()
NO_GPU = f"torch {torch.__version__} sees no CUDA device here"
DEVICE = torch.device("cuda", 0) if HAS_GPU else torch.device("cpu")
ON_DEVICE = {"resources.gpus_per_worker": int(HAS_GPU)}
"""Of a recipe that trains there."""


def synchronise(device: torch.device) -> None:
    """Waits until everything that was started on ``device`` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class DevicePeak:
    """The peak of what torch has allocated on a CUDA ``device``, over what was allocated there when this was made."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        _allocate_workspaces(device)
        self.before = torch.cuda.memory_allocated(device)
        self.restart()

    def restart(self) -> None:
        """Forgets peaks so far; what is allocated still counts."""
        torch.cuda.reset_peak_memory_stats(self.device)

    def bytes(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) - self.before


def _allocate_workspaces(device: torch.device) -> None:
    """cuBLAS takes its workspace from torch's allocator at the first product: one for the forward's thread, one for
    the backward's. They stay, whatever is trained, and are no part of a plan (its reserve covers them)."""
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(64, 64, device=device, dtype=dtype, requires_grad=True)
        (matrix @ matrix).sum().backward()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize(device)
