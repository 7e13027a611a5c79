"""Gloo ranks without Ray or torchrun: processes of this machine that run one function."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Mapping
from typing import Any

from tests.support.waiting import free_port

START = os.environ.get("RANKS_START", "forkserver")
"""``forkserver`` forks ranks from a process that has imported the libraries, which takes longer than most tests.
``spawn`` starts each by itself, as in a run, with a hash seed of its own: what depends on the order of a set differs
between ranks then. The tests of the night use it."""

LIBRARIES = [
    "tests.support.preloaded",
    "torch.distributed.fsdp",
    "transformers.models.llama.modeling_llama",
    "accelerate",
    "deepspeed",
    "s3fs",
]


def run_ranks(function: Callable[..., None], ranks: int, *arguments: Any, join: bool = True) -> Any:
    """``function(rank, *arguments)`` on each rank, which has joined a group of all; raises what a rank raises."""
    import torch.multiprocessing as mp

    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if START == "forkserver":
        multiprocessing.set_forkserver_preload(LIBRARIES)
    told = (function, ranks, free_port(), dict(os.environ), arguments)
    return mp.start_processes(_rank, args=told, nprocs=ranks, join=join, start_method=START)


def _rank(
    rank: int,
    function: Callable[..., None],
    ranks: int,
    port: int,
    environment: Mapping[str, str],
    arguments: tuple[Any, ...],
) -> None:
    import torch
    import torch.distributed as dist

    os.environ.update(environment)  # a fork has that of the process that it was forked from
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks))
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    function(rank, *arguments)
    dist.destroy_process_group()
