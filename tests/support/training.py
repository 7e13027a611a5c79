"""Training in gloo processes without Ray or torchrun: small recipes on the tiny model, several per set of processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from launcher.testing.training import (
    PHRASES,
    adapter_bytes,
    losses,
    prepare,
    run_of,
    small_recipe,
    train_here,
    write_pairs,
)
from tests.support.ranks import run_ranks
from trainer.recipe import Recipe
from trainer.run import layout
from trainer.run.frozen import freeze_recipe
from trainer.run.jsonl import read_rows
from trainer.run.lease import Lease
from trainer.storage import open_storage

__all__ = [
    "PHRASES",
    "adapter_bytes",
    "ledger",
    "losses",
    "prepare",
    "run_of",
    "small_recipe",
    "train_here",
    "train_in_processes",
    "train_rank",
    "write_pairs",
]


def train_in_processes(recipes: Sequence[Recipe], world_size: int) -> None:
    """Trains each recipe's run on ``world_size`` gloo processes, one run after the other in the same processes."""
    run_ranks(train_rank, world_size, list(recipes))


def train_rank(rank: int, recipes: Sequence[Recipe]) -> None:
    """One rank's part, in a process that has joined the group."""
    for recipe in recipes:
        _train(recipe, first=rank == 0)


def _train(recipe: Recipe, *, first: bool) -> None:
    import torch.distributed as dist

    from trainer.errors import Interrupted
    from trainer.worker.attempt import train
    from trainer.worker.job import Job

    storage = open_storage(recipe.storage)
    run = storage.child(recipe.name)
    box: list[Any] = [None]
    lease = Lease.acquire(run) if first else None
    if lease:
        box = [(lease.driver, prepare(recipe, storage).total_steps)]
        freeze_recipe(run, recipe, lease.driver)
    dist.broadcast_object_list(box)
    driver, total = box[0]
    state = "succeeded"
    try:
        train(Job(recipe.storage, driver, recipe, total, {}), lambda: False)
    except Interrupted:
        state = "interrupted"
    if lease:
        lease.release(state)


def ledger(recipe: Recipe) -> dict[tuple[int, int], list[str]]:
    """{(step, micro-batch): samples} of the attempts that count."""
    rows = read_rows(run_of(recipe), layout.LEDGER)
    last: dict[int, int] = {}
    for row in rows:
        last[row["step"]] = max(last.get(row["step"], 0), row["attempt"])
    fed: dict[tuple[int, int], list[str]] = {}
    for row in rows:
        if row["attempt"] == last[row["step"]]:
            key = (row["step"], row["micro_batch"])
            assert key not in fed, f"micro-batch {key} was fed twice"
            fed[key] = row["samples"]
    return fed
