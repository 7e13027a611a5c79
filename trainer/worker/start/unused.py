"""Trained parameters that the loss does not depend on, found before the first step.

A layer can have an adapter and take no part in the loss: its weight is read by other code, its result chooses indices
(which have no gradient), or it belongs to a part of the model that text does not reach. Its adapter would stay as it
is, and DistributedDataParallel would stop in the second step.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from trainer.adapters import Adapter
from trainer.data.made_up import made_up_batch
from trainer.distributed.world import World
from trainer.errors import InputError
from trainer.recipe import Recipe
from trainer.recipe.tasks import SEQUENCE, TASKS
from trainer.strategies import Strategy
from trainer.tasks import Task

log = logging.getLogger(__name__)

LONGEST = 32
"""Tokens of the sample that is tried."""
SHOWN = 5


class UnusedTargets(Exception):
    """Layers have adapters and take no part in the loss; ``names``: their full names in the base model."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(f"{len(names)} layers take no part in the loss")
        self.names = tuple(names)


def check_used(recipe: Recipe, world: World, adapter: Adapter, task: Task, strategy: Strategy) -> None:
    """Collective: runs the loss of one micro-batch on the built model, with training's own arguments.

    Raises UnusedTargets if layers that the adapter can leave out take no part in it, and InputError for others."""
    unused = world.all_gather(_unused(recipe, task, strategy))[0]
    if not unused:
        return
    if layers := adapter.may_leave_out(strategy.model, unused):
        raise UnusedTargets(layers)
    what = f"the loss does not depend on {len(unused)} of the trained parameters ({', '.join(unused[:SHOWN])})"
    if not adapter.full:
        raise InputError(f"{what}: leave their layers out of adapter.target_modules and adapter.modules_to_save")
    if recipe.strategy.kind == "ddp":
        raise InputError(f"{what}, and ddp waits for a gradient of each: use strategy.kind=fsdp")
    if world.is_rank0:
        log.warning("%s: they stay as they are", what)


def _unused(recipe: Recipe, task: Task, strategy: Strategy) -> list[str]:
    """Returns the names of the trained parameters that are not in the loss's graph."""
    was_training = strategy.module.training
    try:
        # Compiled layers would be compiled for this micro-batch alone.
        with strategy.names_in_forward() as seen, torch.random.fork_rng(), torch.compiler.set_stance("force_eager"):
            loss = _loss(recipe, task, strategy)
    finally:
        strategy.module.train(was_training)
    reached = {seen.get(id(leaf)) for leaf in _leaves(loss)}
    del loss
    strategy.reshard()
    return [name for name in strategy.trainable() if name not in reached]


def _loss(recipe: Recipe, task: Task, strategy: Strategy) -> torch.Tensor:
    places = np.arange(min(LONGEST, recipe.data.sequence_length))
    targets = places == places[-1] if TASKS[recipe.task].auto_class == SEQUENCE else places > 0
    batch, device = made_up_batch(recipe, 1, places, places, targets), strategy.world.device
    if task.prepares_steps and not task.generates:
        strategy.module.eval()
        with torch.no_grad(), strategy.autocast():
            task.prepare_step(strategy.module, [batch], device)
        strategy.reshard()
    strategy.module.train()
    # Not the last micro-batch of a step, so that no gradients are exchanged.
    with strategy.micro_batch(last=False), strategy.autocast():
        return task.loss(strategy.module, task.dummy_batch(batch), device).loss_sum


def _leaves(loss: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yields the leaf tensors of the graph that ends in ``loss``."""
    waiting, seen = [loss.grad_fn], set()
    while waiting:
        node: Any = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        waiting.extend(following for following, _ in node.next_functions)
