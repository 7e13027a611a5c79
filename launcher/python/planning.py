"""``muster.plan``: what a recipe needs on each rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher.plan.units import bandwidths, size
from trainer.recipe import Recipe

if TYPE_CHECKING:
    from launcher.plan.estimate import PlanReport


def plan(
    recipe: Recipe,
    *,
    gpu_memory: str | None = None,
    host_memory: str | None = None,
    tokens_per_s: float | None = None,
    price_per_gpu_hour: float | None = None,
    network: str | None = None,
) -> PlanReport:
    """Plans memory, time and cost from the base model's ``config.json``, without its weights; ``print`` shows it.

    ``gpu_memory``, ``host_memory``: of each GPU and each rank, as ``24GiB``; by default those of the GPU here.
    ``tokens_per_s``: speed of all ranks together. ``price_per_gpu_hour``: in any currency. ``network``: bandwidth of
    each rank, as ``25GB/s``. Raises UsageError for a size that cannot be read, InputError for a model without a plan.
    """
    from launcher.plan.estimate import make

    return make(
        recipe,
        None if gpu_memory is None else size(gpu_memory),
        None if host_memory is None else size(host_memory),
        tokens_per_s,
        price_per_gpu_hour,
        None if network is None else bandwidths(network),
    )
