"""Several runs trained in the same processes, without Ray or torchrun."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from safetensors.torch import load

from tests.support.ranks import run_ranks
from tests.support.training import adapter_bytes, ledger, losses, prepare, run_of
from trainer.recipe import Recipe
from trainer.run import layout
from trainer.run.events import TextsEvent
from trainer.run.frozen import freeze_recipe
from trainer.run.jsonl import read_events, read_rows
from trainer.run.lease import Lease
from trainer.storage import open_storage

ALL = -1


def train_group(recipes: Sequence[Recipe], world_size: int, stops: Mapping[int, int] | None = None) -> None:
    """Trains the runs together on ``world_size`` gloo processes. ``stops``: the step after which a run is requested to
    stop, by its number; with ``ALL``, the number of steps of all runs after which every run is."""
    run_ranks(train_group_rank, world_size, list(recipes), dict(stops or {}))


class StopAfter:
    """A stop request after so many steps; never without them."""

    def __init__(self, steps: int | None) -> None:
        self._left = steps

    def __call__(self) -> bool:
        if self._left is not None:
            self._left -= 1
        return self._left is not None and self._left <= 0


def train_group_rank(rank: int, recipes: Sequence[Recipe], stops: Mapping[int, int]) -> None:
    import torch.distributed as dist

    from trainer.worker.job import Job
    from trainer.worker.together.attempt import train_together

    box: list[Any] = [None]
    leases = [Lease.acquire(run_of(recipe)) for recipe in recipes] if rank == 0 else []
    if leases:
        box = [[(lease.driver, _prepared(r, lease)) for r, lease in zip(recipes, leases, strict=True)]]
    dist.broadcast_object_list(box)
    jobs = [Job(r.storage, driver, r, total, {}) for r, (driver, total) in zip(recipes, box[0], strict=True)]
    every = [StopAfter(stops[ALL])] * len(jobs) if ALL in stops else []
    requests = every or [StopAfter(stops.get(n)) for n in range(len(jobs))]
    try:
        train_together(jobs, requests)
    finally:
        for lease in leases:
            lease.release("succeeded")


def _prepared(recipe: Recipe, lease: Lease) -> int:
    total = prepare(recipe, open_storage(recipe.storage)).total_steps
    freeze_recipe(run_of(recipe), recipe, lease.driver)
    return total


def texts(recipe: Recipe) -> list[Any]:
    return [e.texts for e in read_events(run_of(recipe)) if isinstance(e, TextsEvent)]


def evaluations(recipe: Recipe) -> dict[int, float]:
    return {row["step"]: row["eval_loss"] for row in read_rows(run_of(recipe), layout.METRICS) if "eval_loss" in row}


def assert_same_runs(alone: Recipe, together: Recipe) -> None:
    assert losses(together) == pytest.approx(losses(alone), abs=1e-5)
    assert ledger(together) == ledger(alone)
    assert texts(together) == texts(alone)
    assert evaluations(together) == pytest.approx(evaluations(alone), abs=1e-5)
    want, got = load(adapter_bytes(alone)), load(adapter_bytes(together))
    assert want.keys() == got.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-3, atol=1e-4)
