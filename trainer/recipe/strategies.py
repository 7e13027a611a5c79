"""The strategies: what each one shards, the settings that have an effect on it, and the shape of the ranks' mesh."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from trainer.errors import InputError
from trainer.registry import Choice, Registry

if TYPE_CHECKING:
    from trainer.recipe.root import Recipe


@dataclass(frozen=True)
class StrategyRow(Choice):
    """A strategy's row.

    ``shards``: what is divided between the ranks: nothing, gradients and optimizer states, or parameters as well.
    ``settings``: the fields of the recipe's section that have an effect on it. ``zero_stage``: DeepSpeed's, or 0.
    ``plan_runs_wrap``: `wrap` works in a fake process group, so that the plan can measure what it gathers.
    ``takes_several``: runs with an optimizer each can share the model (`trainer.worker.together`)."""

    shards: Literal["nothing", "states", "parameters"] = "nothing"
    settings: tuple[str, ...] = ()
    zero_stage: int = 0
    plan_runs_wrap: bool = False
    takes_several: bool = False

    @property
    def sharded(self) -> bool:
        """True if anything is divided between the ranks."""
        return self.shards != "nothing"


STRATEGIES = Registry(
    "strategy",
    {
        "ddp": StrategyRow("trainer.strategies.ddp:DDP", settings=("context_parallel",), takes_several=True),
        "fsdp": StrategyRow(
            "trainer.strategies.fsdp:FSDP",
            "parameters",
            ("replicas", "context_parallel", "reshard_after_forward", "offload"),
            plan_runs_wrap=True,
            takes_several=True,
        ),
        "zero2": StrategyRow("trainer.strategies.zero:Zero2", "states", ("deepspeed",), zero_stage=2),
        "zero3": StrategyRow("trainer.strategies.zero:Zero3", "parameters", ("deepspeed",), zero_stage=3),
    },
    group="muster.strategies",
    held=StrategyRow(""),
)


@dataclass(frozen=True)
class Mesh:
    """The device mesh: which ranks share a copy of the parameters, and which compute one micro-batch together.

    Ranks are numbered ``replicas x shards x context``, the last axis fastest. Ray Train and torchrun number the ranks
    of a node one after the other, so that a replica, whose ranks exchange most, is on as few nodes as possible. The
    ``context`` ranks of a group get the same micro-batches; each computes a part of the tokens. Parameters are sharded
    over ``shards x context``, so that the ranks of a replica together hold one copy of them."""

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

    def to_json(self) -> dict[str, int]:
        return {"replicas": self.replicas, "shards": self.shards, "context": self.context}
