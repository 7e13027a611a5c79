"""The bandwidth of all-reduce and all-gather among several ranks.

The process group is made like that of a pair (`launcher.doctor.probes.pair`), so that a rank can measure in one group
after another.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from statistics import median
from typing import TYPE_CHECKING, Any

from launcher.doctor.probes.pair import dial, join_store, leave_group, make_group

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

SMALL_BYTES = 4 * 2**20
LARGE_BYTES = 128 * 2**20
"""The buffer of all ranks together. A fast network between GPUs needs the large one to reach its bandwidth."""
FAST_S = 0.02
"""A small all-reduce that takes longer shows the bandwidth already."""
MEASURE_S = 0.3
LEAST_REPEATS, MOST_REPEATS = 3, 10
CONNECT_SHARE = 0.6
"""Share of a rank's time limit for finding the others."""


@dataclass(frozen=True)
class Bandwidth:
    """The bytes that a rank sends per second, from the median of several times.

    A ring of n ranks is assumed: for S bytes (``size_bytes``), a rank sends 2 S (n - 1) / n in an all-reduce, and
    S (n - 1) / n in an all-gather, where S is the gathered size."""

    backend: str
    size_bytes: int
    all_reduce_bytes_per_s: float
    all_gather_bytes_per_s: float


@dataclass(frozen=True)
class GroupResult:
    """The result of one rank. ``error``: why there is no bandwidth."""

    bandwidth: Bandwidth | None = None
    error: str | None = None


def measure_bandwidth(
    name: str, store: dist.Store | tuple[str, int], rank: int, size: int, *, gpu: bool, timeout_s: float
) -> GroupResult:
    """Measures all-reduce and all-gather in the group ``name``.

    Each of its ``size`` ranks calls it once, at the same time: ``rank`` 0 with its own store, the others with that
    store's address and port. All waits together end after about ``timeout_s``. A failure is returned on every rank that
    waits, and not raised. With ``gpu`` it is measured through NCCL on the current CUDA device, else through gloo.
    """
    import torch
    import torch.distributed as dist

    deadline = time.monotonic() + timeout_s

    def left() -> timedelta:
        return timedelta(seconds=max(0.1, deadline - time.monotonic()))

    backend, device = ("nccl", "cuda") if gpu else ("gloo", "cpu")
    try:
        if isinstance(store, tuple):
            dial(store, timeout_s * CONNECT_SHARE)
        found = join_store(store, timeout_s * CONNECT_SHARE)
        limit = timedelta(seconds=timeout_s * CONNECT_SHARE)
        group = make_group(backend, dist.PrefixStore(f"{name}/{backend}", found), rank, size, limit)
        try:
            return GroupResult(_measure(backend, group, size, torch.device(device), left))
        finally:
            leave_group(group)
    except (RuntimeError, OSError) as error:  # c10d's own errors are RuntimeErrors
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return GroupResult(error=lines[0] if lines else type(error).__name__)


def _measure(backend: str, group: Any, size: int, device: torch.device, left: Callable[[], timedelta]) -> Bandwidth:
    import torch

    def timed(act: Callable[[], Any]) -> float:
        begin = time.perf_counter()
        act().wait(left())
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    def agreed(value: float) -> float:
        """Returns the mean over the ranks, so that all of them decide alike."""
        tensor = torch.tensor([value], dtype=torch.float32, device=device)
        group.allreduce([tensor]).wait(left())
        return float(tensor) / size

    def repeated(act: Callable[[], Any]) -> float:
        timed(act)  # the first one allocates buffers
        first = agreed(timed(act))
        count = max(LEAST_REPEATS, min(MOST_REPEATS, int(MEASURE_S / max(first, 1e-6))))
        return median(timed(act) for _ in range(count))

    chunk = torch.zeros(SMALL_BYTES // 4 // size, device=device)
    buffer = torch.zeros(chunk.numel() * size, device=device)
    timed(lambda: group.allreduce([buffer]))
    fast = agreed(timed(lambda: group.allreduce([buffer]))) < FAST_S
    if device.type == "cuda" and fast:
        chunk = torch.zeros(LARGE_BYTES // 4 // size, device=device)
        buffer = torch.zeros(chunk.numel() * size, device=device)
    reduce_s = repeated(lambda: group.allreduce([buffer]))
    gather_s = repeated(lambda: group.allgather([list(buffer.chunk(size))], [chunk]))
    size_bytes = buffer.numel() * buffer.element_size()
    sent = size_bytes * (size - 1) / size
    return Bandwidth(backend, size_bytes, 2 * sent / reduce_s, sent / gather_s)
