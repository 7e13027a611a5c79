"""DDP: every rank has the full model; torch's DistributedDataParallel averages gradients during the backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.parallel import DistributedDataParallel

from trainer.strategies.base import Strategy


class DDP(Strategy):
    def wrap(self, model: torch.nn.Module) -> torch.nn.Module:
        # No broadcast (init_sync): every rank has loaded and initialised the same values.
        module = DistributedDataParallel(
            model, init_sync=False, forward_sync_buffers=False, gradient_as_bucket_view=True
        )
        assert module.process_group.size() == self.world.size
        return module

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        assert isinstance(self.module, DistributedDataParallel)
        if last:
            yield
        else:
            with self.module.no_sync():
                yield

    def full_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def shard_like(self, whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return whole.to(device=like.device, dtype=like.dtype)

    def wrapped(self) -> list[str]:
        return [""] if isinstance(self.module, DistributedDataParallel) else []
