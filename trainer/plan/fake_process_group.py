"""A world of any number of ranks in one process, whose collectives transfer no data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from trainer.distributed.world import World

CPU = torch.device("cpu")


@contextmanager
def fake_world(size: int, rank: int = 0) -> Iterator[World]:
    """Makes this process one of ``size`` ranks. It must not be in a process group already."""
    assert not dist.is_initialized(), "a plan is made outside of any process group"
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield World(rank, size, 0, CPU)
    finally:
        dist.destroy_process_group()
