"""Several runs trained in the same processes, without Ray or torchrun."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.support.ranks import run_ranks
from tests.support.training import prepare, run_of
from trainer.recipe import Recipe
from trainer.run.frozen import freeze_recipe
from trainer.run.lease import Lease
from trainer.storage import open_storage


def train_group(recipes: Sequence[Recipe], world_size: int) -> None:
    """Trains the runs together on ``world_size`` gloo processes."""
    run_ranks(train_group_rank, world_size, list(recipes))


def train_group_rank(rank: int, recipes: Sequence[Recipe]) -> None:
    import torch.distributed as dist

    from trainer.worker.job import Job
    from trainer.worker.together.attempt import train_together

    box: list[Any] = [None]
    leases = [Lease.acquire(run_of(recipe)) for recipe in recipes] if rank == 0 else []
    if leases:
        box = [[(lease.driver, _prepared(r, lease)) for r, lease in zip(recipes, leases, strict=True)]]
    dist.broadcast_object_list(box)
    jobs = [Job(r.storage, driver, r, total, {}) for r, (driver, total) in zip(recipes, box[0], strict=True)]
    try:
        train_together(jobs, [lambda: False] * len(jobs))
    finally:
        for lease in leases:
            lease.release("succeeded")


def _prepared(recipe: Recipe, lease: Lease) -> int:
    total = prepare(recipe, open_storage(recipe.storage)).total_steps
    freeze_recipe(run_of(recipe), recipe, lease.driver)
    return total
