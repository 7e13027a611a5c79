"""The process group of a run: this process's rank, its device, and the few collectives that the loop needs.

The process group is torch's own. If a launcher has made one already (Ray Train), it is used; under torchrun it is made
from the environment; a single process gets a group of size one, so that every strategy runs the same code.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from trainer.errors import InputError

T = TypeVar("T")
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
THREADS_TURN_S = 0.02
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class World:
    """This process as one of ``size`` ranks.

    All methods are collectives: every rank calls them, in the same order (properties are not). A rank that dies makes
    the others raise after at most ``COLLECTIVE_TIMEOUT``."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_rank0(self) -> bool:
        return self.rank == 0

    @property
    def host(self) -> str:
        return socket.gethostname()

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        """Returns the element-wise sum over the ranks, in float64."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return [float(v) for v in tensor.tolist()]

    def all_gather(self, value: Any) -> list[Any]:
        """Returns every rank's (picklable, small) value, in the order of the ranks, on every rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """Returns rank 0's (picklable, small) value on every rank."""
        box = [value if self.is_rank0 else None]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def decide_on_rank0(self, decide: Callable[[], T]) -> T:
        """Calls ``decide`` on rank 0 only; every rank returns its result, or raises its exception."""
        outcome: tuple[T | None, Exception | None] = (None, None)
        if self.is_rank0:
            try:
                outcome = (decide(), None)
            except Exception as error:
                outcome = (None, error)
        value, failure = self.broadcast(outcome)
        if failure is not None:
            raise failure
        return cast(T, value)


def pick_device(local_rank: int, *, gpu: bool) -> torch.device:
    """Returns the CPU or the GPU of ``local_rank``; raises InputError when ``gpu`` is true and torch sees none."""
    if not gpu:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError(
            f"resources.gpus_per_worker requests GPUs, and torch {torch.__version__} sees none on "
            f"{socket.gethostname()}: check nvidia-smi and that torch is a CUDA build, or set "
            "resources.gpus_per_worker=0"
        )
    # Ray shows a worker its own devices only; torchrun shows each worker all devices of the host.
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def backend_of(*, gpu: bool) -> str:
    # gloo in addition to NCCL: the norm of gradients that are offloaded to the host is computed there.
    return "cpu:gloo,cuda:nccl" if gpu else "gloo"


def stay_on_loopback() -> None:
    """Makes gloo and NCCL listen on the loopback interface only, since they do not authenticate connections.

    For ranks of one host, before they join their group. Settings of the user are kept."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == LOOPBACK for address in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


def loopback_store(port: int, rank: int, size: int) -> dist.Store:
    """Returns the store over which ranks of one host form their group. Every rank calls it; rank 0 listens."""
    descriptor = None
    if rank == 0:
        # Our own socket: one that torch opens listens on every interface.
        listener = socket.create_server((LOOPBACK, port))
        descriptor = listener.detach()  # the store closes it
    return dist.TCPStore(
        LOOPBACK, port, size, rank == 0, COLLECTIVE_TIMEOUT, wait_for_workers=False, master_listen_fd=descriptor
    )


def _init_group(device: torch.device) -> None:
    backend = backend_of(gpu=device.type == "cuda")
    if "RANK" in os.environ and "MASTER_ADDR" in os.environ:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
            stay_on_loopback()
        if os.environ["MASTER_ADDR"] == LOOPBACK and "TORCHELASTIC_RUN_ID" not in os.environ:
            store = loopback_store(int(os.environ["MASTER_PORT"]), rank, size)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=COLLECTIVE_TIMEOUT)
        else:  # torchrun has made the store
            dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=COLLECTIVE_TIMEOUT)


@contextmanager
def join_world(*, gpu: bool) -> Iterator[World]:
    """Joins the process group, and destroys it at the end if it was made here. ``gpu``: train on a GPU, else on the
    CPU."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = pick_device(local_rank, gpu=gpu)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    ours = not dist.is_initialized()
    if ours:
        _init_group(device)
    try:
        yield World(dist.get_rank(), dist.get_world_size(), local_rank, device)
    finally:
        if ours:
            # Gloo deadlock: its threads need the GIL to free the last collective's tensors, and destroy_process_group
            # joins them while it holds the GIL. Sleep so that they finish.
            time.sleep(THREADS_TURN_S)
            dist.destroy_process_group()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def memory_bytes(device: torch.device) -> int:
    """Returns the peak of this process's GPU memory so far; on CPUs, its host memory at present."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import psutil

    return int(psutil.Process().memory_info().rss)
