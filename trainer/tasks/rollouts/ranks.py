"""The exchanges between the ranks that generate together; without any in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from trainer.distributed.world import World
from trainer.errors import MusterError, RewardFailed

T = TypeVar("T")


@dataclass(frozen=True)
class Peers:
    """``world``: None in a process of its own. All methods are collectives."""

    world: World | None

    @property
    def here(self) -> tuple[int, int]:
        """This rank's number, and the number of ranks."""
        return (self.world.rank, self.world.size) if self.world else (0, 1)

    def any(self, here: bool) -> bool:
        """Returns True if any rank passes True."""
        return bool(self.world.all_reduce_sum([float(here)])[0]) if self.world else here

    def joined(self, mine: Sequence[T]) -> list[T]:
        """Returns the (small) values of all ranks."""
        return [value for some in (self.world.all_gather(mine) if self.world else [mine]) for value in some]

    def decide(self, decide: Callable[[], T]) -> T:
        """Calls ``decide`` on rank 0; every rank returns its result or raises its exception."""
        return self.world.decide_on_rank0(decide) if self.world else decide()

    def together(self, do: Callable[[], T], where: str) -> T:
        """Calls ``do`` on each rank and returns its own result, or raises on all ranks what one of them raises, with
        ``where`` in a RewardFailed."""
        made: list[T] = []
        failure: MusterError | None = None
        try:
            made.append(do())
        except MusterError as error:
            failure = error
        self.raise_together(failure, where)
        return made[0]

    def raise_together(self, failure: MusterError | None, where: str) -> None:
        """Raises on all ranks what failed on one, so that none waits for another."""
        for rank, failed in enumerate(self.joined([failure])):
            if isinstance(failed, RewardFailed):
                raise RewardFailed(f"{where}, rank {rank}: {failed}") from failure
            if failed is not None:
                raise failed
