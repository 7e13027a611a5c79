"""Training steps on a base of any shape with random weights, which are made on the device: no files, no tokenizer."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from trainer.adapters import make_adapter
from trainer.data import Batch
from trainer.distributed.world import World
from trainer.layers import change_layers
from trainer.model.meta import four_bit_layers, meta_model, pack
from trainer.optim import make_optimizer
from trainer.recipe import Recipe
from trainer.strategies import Strategy, make_strategy
from trainer.tasks import Task, make_task
from trainer.worker.mfu import Operations, operations_of

STD = 0.02


class Parts(NamedTuple):
    strategy: Strategy
    task: Task
    device: torch.device
    operations: Operations


def random_parts(recipe: Recipe, world: World) -> Parts:
    """What a rank trains with, on random weights. ``model.path``: a folder that holds a ``config.json``."""
    adapter, task, strategy = make_adapter(recipe), make_task(recipe), make_strategy(recipe, world)
    checkpointing, folder = recipe.training.gradient_checkpointing, Path(recipe.model.path)
    base = meta_model(recipe.model, folder, world.device, full=adapter.full, checkpointing=checkpointing)
    fill_randomly(base, world.device)
    model = adapter.attach(base)
    task.attach(model)
    operations = operations_of(model)
    change_layers(model, recipe.compute, world.device)
    strategy.setup(model, partial(make_optimizer, recipe.optimizer, lr_scale=adapter.lr_scale))
    strategy.module.train()
    return Parts(strategy, task, world.device, operations)


@torch.no_grad()
def fill_randomly(base: torch.nn.Module, device: torch.device) -> None:
    """Gives each parameter on the meta device random values: matrices N(0, STD²), norms 1, biases 0; those of 4-bit
    layers are quantised."""
    packed = {layer.weight: layer for layer in four_bit_layers(base).values()}
    made: dict[torch.nn.Parameter, torch.nn.Parameter] = {}  # tied parameters stay one
    for module in base.modules():
        for name, old in module._parameters.items():
            if old in packed:
                layer = packed[old]
                shape = torch.Size((layer.out_features, layer.in_features))
                pack(layer, _random(name, shape, layer.quant_state.dtype, device))
            elif old is not None and old.is_meta:
                if old not in made:
                    values = _random(name, old.shape, old.dtype, device)
                    made[old] = torch.nn.Parameter(values, requires_grad=old.requires_grad)
                module._parameters[name] = made[old]


def _random(name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    values = torch.empty(shape, dtype=dtype, device=device)
    return values.normal_(0.0, STD) if len(shape) > 1 else values.fill_(float(name == "weight"))


def full_packs(packs: int, length: int, samples: int = 1, vocabulary: int = 1000) -> Batch:
    """A micro-batch of ``packs`` rows of ``length`` tokens, each of ``samples`` equally long samples, whose tokens are
    all targets but for the first."""
    assert length % samples == 0, f"{samples} samples do not fill {length} tokens"
    positions = np.tile(np.arange(length) % (length // samples), (packs, 1))
    targets = positions > 0
    tokens = np.random.default_rng(1).integers(0, vocabulary, positions.shape)
    return Batch(0, tokens, positions, targets, tokens=positions.size, target_tokens=int(targets.sum()))


def one_step(parts: Parts, batch: Batch, lr: float = 1e-4) -> torch.Tensor:
    """Forward, backward and update; the mean loss, on the device."""
    strategy = parts.strategy
    with strategy.micro_batch(last=True):
        with strategy.autocast():
            loss = parts.task.loss(strategy.module, batch, parts.device).loss_sum / batch.target_tokens
        strategy.backward(loss)
    strategy.step(lr)
    mean: torch.Tensor = loss.detach()
    return mean
