"""The speed of an all-reduce between two ranks.

The process group is separate from torch's default group and is dropped afterwards, so that a process can meet one rank
after another. The ranks exchange addresses only to connect; gloo and NCCL choose the interface, as in training.
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
THREADS_TURN_S = 0.02  # for gloo's threads to release the last tensors; see `trainer.distributed.world`


@dataclass(frozen=True)
class Timing:
    """All-reduce times of one backend.

    ``latency_us``: the median for one number. ``bus_gb_s``: 2(n-1)/n · bytes / time as in nccl-tests (n = 2, 10⁹ bytes
    per second), from the median for 8 MiB. ``connect_s``: until the first all-reduce was complete.
    """

    backend: str
    connect_s: float
    latency_us: float
    bus_gb_s: float


@dataclass(frozen=True)
class PairTimes:
    """The result of a meeting.

    ``error``: why the last backend has no timing. ``stage``: where it failed: ``connect`` (to the other's address and
    port), ``store`` (torch's store, which answers there), or the backend's name.
    """

    timings: tuple[Timing, ...] = ()
    error: str | None = None
    stage: str | None = None


def open_store(address: str, timeout_s: float) -> dist.TCPStore:
    """Opens a store on a free port of this host. Other ranks can `meet` this one while the store is referenced."""
    import torch.distributed as dist

    wait = timedelta(seconds=timeout_s)
    if ipaddress.ip_address(address).is_loopback:
        listener = socket.create_server((address, 0))  # torch alone would open the port on every interface
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
    """Measures all-reduces between the two ranks of the pair ``name``.

    Both ranks call it once, at the same time: the first with its own store, the second with the first's address and
    port. Each wait ends after ``timeout_s``; both ranks return a failure and do not raise it. ``gpu``: also measures
    NCCL between the current CUDA devices, after gloo, which training always uses for control messages.
    """
    import torch
    import torch.distributed as dist

    timings: list[Timing] = []
    stage = "store"
    limit = timedelta(seconds=timeout_s)
    try:
        rank = 1 if isinstance(store, tuple) else 0
        if isinstance(store, tuple):
            stage = "connect"
            dial(store, timeout_s)
            stage = "store"
        store = join_store(store, timeout_s)
        backends = [("gloo", "cpu"), ("nccl", "cuda")] if gpu else [("gloo", "cpu")]
        for stage, device in backends:
            begin = time.perf_counter()
            group = make_group(stage, dist.PrefixStore(f"{name}/{stage}", store), rank, 2, limit)
            try:
                timings.append(_measure(stage, group, torch.device(device), begin, limit))
            finally:
                leave_group(group)
    except (RuntimeError, OSError) as error:  # c10d's own errors are RuntimeErrors
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return PairTimes(tuple(timings), lines[0] if lines else type(error).__name__, stage)
    return PairTimes(tuple(timings))


def dial(at: tuple[str, int], timeout_s: float) -> None:
    """Connects once and raises OSError at once if nothing answers; c10d would retry."""
    socket.create_connection(at, min(DIAL_S, timeout_s)).close()


def join_store(store: dist.Store | tuple[str, int], timeout_s: float) -> dist.Store:
    """Returns the store, or a client of the one at this address and port."""
    import torch.distributed as dist

    if not isinstance(store, tuple):
        return store
    return dist.TCPStore(*store, is_master=False, timeout=timedelta(seconds=timeout_s), use_libuv=True)


def make_group(backend: str, store: dist.Store, rank: int, size: int, limit: timedelta) -> Any:
    """Returns a process group next to torch's default one. Every rank of the group calls it."""
    import torch.distributed as dist

    if backend == "gloo":
        return dist.ProcessGroupGloo(store, rank, size, limit)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = limit
    return dist.ProcessGroupNCCL(store, rank, size, options)


def leave_group(group: Any) -> None:
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
    """Returns the median time in seconds. Collective: the all-reduced first times give both ranks the same count."""
    import torch

    first = torch.tensor([act()], dtype=torch.float32, device=device)
    reduce(first)
    count = max(1, min(most, int(MEASURE_S / max(float(first) / 2, 1e-6))))
    return median(act() for _ in range(count))
