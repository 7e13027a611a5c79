"""The device mesh: which ranks share a copy of the parameters, and which compute one micro-batch together.

Ranks are numbered ``replica x shard x context``, the last axis fastest. Launchers number the ranks of a node one after
the other, so that a replica, whose ranks exchange most, is on as few nodes as possible. The ``context`` ranks of a
group have neighbouring numbers and get the same micro-batches; each computes a part of the tokens. Parameters are
sharded over ``shard x context``, and a replica's ranks together hold one copy of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from trainer.errors import InputError

if TYPE_CHECKING:
    from trainer.recipe import Recipe


@dataclass(frozen=True)
class Mesh:
    """The sizes of the axes. All ranks together: ``replicas * shards * context``."""

    replicas: int
    shards: int
    context: int

    @classmethod
    def of(cls, recipe: Recipe, ranks: int) -> Mesh:
        """Returns the recipe's mesh of this many ranks.

        With fewer ranks than ``resources.workers`` a run has fewer replicas, so that no rank keeps more than planned:
        the most for which that holds, up to the recipe's. Raises InputError if ``context_parallel`` does not divide
        ``ranks``."""
        strategy, context = recipe.strategy, recipe.strategy.context_parallel
        if ranks % context:
            raise InputError(
                f"strategy.context_parallel is {context}, which does not divide {ranks} workers; start a multiple of "
                f"{context} workers, or set context_parallel to a divisor of {ranks}"
            )
        groups = ranks // context
        if strategy.row.shards == "nothing":
            return cls(groups, 1, context)
        planned = recipe.resources.max_workers // strategy.replicas // context
        most = min(strategy.replicas, groups)
        replicas = next(n for n in range(most, 0, -1) if groups % n == 0 and (n == 1 or groups // n >= planned))
        return cls(replicas, groups // replicas, context)

    @property
    def ranks(self) -> int:
        return self.replicas * self.shards * self.context

    @property
    def data_ranks(self) -> int:
        """The number of groups that run micro-batches of their own."""
        return self.replicas * self.shards

    def data_rank(self, rank: int) -> int:
        return rank // self.context

    def context_rank(self, rank: int) -> int:
        """Returns the rank's number among those that compute the same micro-batches. The first one counts for all."""
        return rank % self.context

    @property
    def ranks_per_replica(self) -> int:
        return self.shards * self.context

    def shard_rank(self, rank: int) -> int:
        """Returns the rank's number in its replica, which determines the slices that it keeps."""
        return rank % self.ranks_per_replica

    def context_group(self, device: str) -> dist.ProcessGroup:
        """Collective over all ranks: returns the group of the ranks that compute the same micro-batches as this one."""
        mesh = init_device_mesh(device, (self.data_ranks, self.context), mesh_dim_names=("data", "context"))
        return mesh["context"].get_group()

    def to_json(self) -> dict[str, int]:
        return {"replicas": self.replicas, "shards": self.shards, "context": self.context}
