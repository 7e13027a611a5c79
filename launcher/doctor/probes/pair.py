"""Two ranks, and how fast an all-reduce between them is.

The group is made beside torch's default one and dropped afterwards, so that a process can meet one rank after another.
Each rank is told the other's address; it is gloo and NCCL that choose the interface, as they will when training.
"""

from __future__ import annotations

import ipaddress
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

SMALL = 1
LARGE_BYTES = 8 * 2**20
MOST_SMALL, MOST_LARGE = 50, 10
MEASURE_S = 0.3
DIAL_S = 3.0
THREADS_TURN_S = 0.02  # see `trainer.distributed.world`: gloo's threads let go of the last tensors


@dataclass(frozen=True)
class Timing:
    """``latency_us``: median of all-reduces of one number. ``bus_gb_s``: 2(n-1)/n · bytes / time as in nccl-tests
    (n = 2, 10⁹ bytes per second), of the median all-reduce of 8 MiB. ``connect_s``: until the first one was done."""

    backend: str
    connect_s: float
    latency_us: float
    bus_gb_s: float


@dataclass(frozen=True)
class PairTimes:
    """``error``: why there is no timing of the last backend; ``stage``: how far it came: ``connect`` (to the other's
    address and port), ``store`` (torch's, which answers there), then the backend's name."""

    timings: tuple[Timing, ...] = ()
    error: str | None = None
    stage: str | None = None


def open_store(address: str, timeout_s: float) -> dist.TCPStore:
    """A store on a free port of this host, where others `meet` this rank as long as it is kept. On a loopback address
    it listens there alone; torch would open the port on every interface."""
    import torch.distributed as dist

    wait = timedelta(seconds=timeout_s)
    if ipaddress.ip_address(address).is_loopback:
        listener = socket.create_server((address, 0))
        port = listener.getsockname()[1]
        return dist.TCPStore(
            address, port, is_master=True, wait_for_workers=False, timeout=wait, master_listen_fd=listener.detach()
        )
    return dist.TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=wait, use_libuv=True)


def meet(
    name: str,
    store: dist.Store | tuple[str, int],
    *,
    gpu: bool,
    timeout_s: float,
) -> PairTimes:
    """Called by both ranks of the pair ``name`` at the same time, once: the first with its own store, the second with
    the first's address and port. Each wait ends after ``timeout_s``, and a failure is what is returned on both sides.

    ``gpu``: measures NCCL between the current CUDA devices after gloo, which training uses for its control anyway."""
    import torch
    import torch.distributed as dist

    timings: list[Timing] = []
    stage = "store"
    limit = timedelta(seconds=timeout_s)
    try:
        rank = 1 if isinstance(store, tuple) else 0
        if isinstance(store, tuple):
            stage = "connect"
            socket.create_connection(store, min(DIAL_S, timeout_s)).close()  # c10d would try again and again
            stage = "store"
            store = dist.TCPStore(*store, is_master=False, timeout=limit, use_libuv=True)
        for stage, device in _backends(gpu=gpu):
            begin = time.perf_counter()
            group = _group(stage, dist.PrefixStore(f"{name}/{stage}", store), rank, limit)
            try:
                timings.append(_measure(stage, group, torch.device(device), begin, limit))
            finally:
                _drop(group)
    except (RuntimeError, OSError) as error:  # c10d's own errors are RuntimeErrors
        return PairTimes(tuple(timings), _first_line(error), stage)
    return PairTimes(tuple(timings))


def _backends(*, gpu: bool) -> tuple[tuple[str, str], ...]:
    return (("gloo", "cpu"), ("nccl", "cuda")) if gpu else (("gloo", "cpu"),)


def _group(backend: str, store: dist.Store, rank: int, limit: timedelta) -> Any:
    import torch.distributed as dist

    if backend == "gloo":
        return dist.ProcessGroupGloo(store, rank, 2, limit)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = limit
    return dist.ProcessGroupNCCL(store, rank, 2, options)


def _drop(group: Any) -> None:
    time.sleep(THREADS_TURN_S)
    if hasattr(group, "abort") and group.name() == "nccl":
        group.abort()


def _measure(backend: str, group: Any, device: torch.device, begin: float, limit: timedelta) -> Timing:
    import torch

    def reduce(tensor: torch.Tensor) -> float:
        start = time.perf_counter()
        group.allreduce([tensor]).wait(limit)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    small = torch.zeros(SMALL, device=device)
    reduce(small)
    connect_s = time.perf_counter() - begin
    latency_s = _repeat(lambda: reduce(small), reduce, MOST_SMALL, device)
    large = torch.zeros(LARGE_BYTES // 4, device=device)
    took_s = _repeat(lambda: reduce(large), reduce, MOST_LARGE, device)
    return Timing(backend, connect_s, latency_s * 1e6, LARGE_BYTES / took_s / 1e9)


def _repeat(
    act: Callable[[], float], reduce: Callable[[torch.Tensor], float], most: int, device: torch.device
) -> float:
    """The median time in seconds. Both ranks have to do it equally often: the sum of their first times says how."""
    import torch

    first = torch.tensor([act()], dtype=torch.float32, device=device)
    reduce(first)
    count = max(1, min(most, int(MEASURE_S / max(float(first) / 2, 1e-6))))
    return median(act() for _ in range(count))


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
