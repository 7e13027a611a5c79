"""The resources that the job requests from the cluster."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, Strict

from trainer.recipe.base import Conflict, Section, takes

Count = Annotated[int, Field(ge=1)]
Bounds = Annotated[tuple[Count, Count], Strict(False)]


class ResourcesSection(Section):
    """The resources that the job requests from the cluster."""

    workers: Annotated[Count | Bounds, takes("a number of workers from 1 up, or [min, max]")] = 1
    """Number of training processes, or `[min, max]` to continue with the resources that are available. The result does
    not depend on it."""

    gpus_per_worker: int = Field(default=0, ge=0)
    """GPUs that each worker reserves; 0 trains on the CPU."""

    cpus_per_worker: int = Field(default=1, ge=1)
    """CPU cores that each worker reserves, for reading data as well as for training."""

    placement: Literal["pack", "spread"] = "pack"
    """`pack` puts workers on as few nodes as possible, where they are near each other; `spread` on as many as possible,
    where each has more of the node's memory and network."""

    accelerator_type: str | None = None
    """Kind of GPU that every worker must have, by Ray's name (`A100`, `H100`, `L4`); null takes any."""

    labels: dict[str, str] = Field(default_factory=dict)
    """Labels of the Ray nodes that workers may run on, e.g. `{"ray.io/market-type": on-demand}`."""

    max_failures: int = Field(default=3, ge=0)
    """Restarts of the worker group, without a new checkpoint in between, before the run fails. The third occurrence of
    the same error at the same step ends the run. A resize or a move of workers is no failure."""

    @property
    def min_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    def conflicts(self) -> Iterator[Conflict]:
        if self.min_workers > self.max_workers:
            low, high = self.min_workers, self.max_workers
            yield Conflict((("workers",),), f"[{low}, {high}] has its minimum above its maximum; write [{high}, {low}]")
