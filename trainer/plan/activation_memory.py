"""The memory of a rank's forward and backward: activations, and parameters that are gathered.

The recipe's own task computes its loss, forward and backward, on the recipe's own architecture under fake tensors
(shapes without values), with two and with three decoder layers. The difference is the memory that one more layer holds
until its backward; the peak at the true depth follows from it. For FSDP2 the computation is repeated with the
strategy's own wrapping on a fake process group, which adds the gathered layers and their buffers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention

from trainer.data import Batch
from trainer.errors import InputError
from trainer.layers.find import decoder_layers
from trainer.layers.offloading import CountedCopies, keep_layer_inputs
from trainer.layers.tiling import tile_layers
from trainer.model.files.configs import UNUSABLE, cause
from trainer.model.kernels.context import Context
from trainer.plan.allocation_tracker import LiveBytes
from trainer.plan.fake_process_group import CPU, fake_world
from trainer.plan.meta_model import labels_of, layer_count, skeleton, with_layers
from trainer.precision import needs_autocast
from trainer.recipe import Recipe
from trainer.recipe.strategies import Mesh
from trainer.recipe.tasks import TASKS
from trainer.strategies import make_strategy
from trainer.tasks import Task, make_task

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

MEASURED_LAYERS = 3
FIRST, DEEP = "first", "deep"


class ActivationBytes(NamedTuple):
    """Bytes at one depth. ``first``: peak before the second layer, the same at any depth; ``deep``: peak after that,
    which grows with the depth; ``held``: allocated between forward and backward; ``on_host``: of the host's memory
    between them."""

    first: int
    deep: int
    held: int
    on_host: int = 0

    @property
    def peak(self) -> int:
        return max(self.first, self.deep)

    def at(self, depth: int, measured: int, shallower: ActivationBytes) -> ActivationBytes:
        """Returns the bytes with ``depth`` layers, given these for ``measured`` layers and ``shallower`` for one
        less."""
        more = depth - measured
        held, on_host = self.held - shallower.held, self.on_host - shallower.on_host
        return ActivationBytes(
            self.first, self.deep + more * held, self.held + more * held, self.on_host + more * on_host
        )


class Working(NamedTuple):
    """Bytes at the peak of forward and backward, without those that a rank keeps between steps; ``on_host``: of the
    host's memory."""

    activations: int
    unsharded: int
    on_host: int = 0


def working_set(recipe: Recipe, config: PreTrainedConfig, ranks: int) -> Working:
    """Returns the bytes of each of ``ranks`` ranks that run the recipe's micro-batches.

    Raises InputError when the model's forward depends on tensors' values, which fake tensors do not have."""
    whole = _at_depth(recipe, config, None)
    if not recipe.strategy.row.plan_runs_wrap:
        return Working(whole.peak, 0, whole.on_host)
    return Working(whole.peak, max(0, _at_depth(recipe, config, ranks).peak - whole.peak), whole.on_host)


def _at_depth(recipe: Recipe, config: PreTrainedConfig, ranks: int | None) -> ActivationBytes:
    depth = layer_count(config)
    most = min(MEASURED_LAYERS, depth)
    deeper = measure(recipe, with_layers(config, most), ranks)
    if most == depth:
        return deeper
    return deeper.at(depth, most, measure(recipe, with_layers(config, most - 1), ranks))


def measure(recipe: Recipe, config: PreTrainedConfig, ranks: int | None) -> ActivationBytes:
    """Runs one micro-batch, forward and backward, sharded over ``ranks`` by FSDP2, or not sharded if None. The ranks of
    context parallelism divide its tokens in both."""
    together = recipe.strategy.context_parallel
    size = ranks or (together if together > 1 else 0)
    try:
        with _without_logs(), fake_world(size) if size else nullcontext() as world:
            model = skeleton(recipe, config, as_gathered=ranks is None and recipe.strategy.row.sharded)
            layers = decoder_layers(model)
            task = make_task(recipe, labels_of(recipe))
            task.attach(model)
            if recipe.compute.tile_tokens:
                tile_layers(model, recipe.compute.tile_tokens)
            copies = CountedCopies()
            if recipe.compute.offload_activations and recipe.resources.gpus_per_worker:
                keep_layer_inputs(model, copies)
            if together > 1:
                _divide_tokens(task, model, Mesh.of(recipe, size))
            if world is None or ranks is None:
                return _run(recipe, model, task, layers, copies, settle=lambda: None)
            strategy = make_strategy(on_device(recipe), world)
            strategy.model = strategy.wrap(model)
            return _run(recipe, strategy.model, task, layers, copies, settle=strategy.reshard)
    except (*UNUSABLE, RuntimeError) as error:
        raise InputError(
            f"model.path {recipe.model.path!r}: the memory of a {config.model_type!r} model's forward and backward "
            f"cannot be computed without weights: {cause(error)}"
        ) from error


def _divide_tokens(task: Task, model: Any, mesh: Mesh) -> None:
    context = Context.of(mesh, CPU)
    context.use(model.get_base_model() if hasattr(model, "get_base_model") else model, _attention_of_a_pack)
    task.compute_together(context)


def _attention_of_a_pack(module: Any, *qkv: Any, scaling: float | None = None, **_: Any) -> tuple[torch.Tensor, None]:
    """A pack of one sample. The kernels for several read where each begins, which fake tensors do not know."""
    query, key, value = qkv[:3]
    out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2), None


@contextmanager
def _without_logs() -> Iterator[None]:
    """Silences torch, which logs the stack of an error under fake tensors before it raises it."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def on_device(recipe: Recipe) -> Recipe:
    """Returns the recipe without offload, which needs the same memory on the device while it computes."""
    strategy = recipe.strategy.model_copy(update={"offload": False})
    return recipe.model_copy(update={"strategy": strategy})


def _run(
    recipe: Recipe,
    model: torch.nn.Module,
    task: Task,
    layers: list[torch.nn.Module],
    copies: CountedCopies,
    settle: Callable[[], None],
) -> ActivationBytes:
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device=CPU)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        live, batch = LiveBytes([*model.parameters(), *gradients, *model.buffers()]), _batch(recipe)
        if len(layers) > 1:
            layers[1].register_forward_pre_hook(lambda *_: setattr(live, "stage", DEEP))
        with live.counting():
            if task.prepares_steps and not task.generates:
                model.eval()
                with torch.no_grad(), _autocast(recipe, model):
                    task.prepare_step(model, [batch], CPU)
                model.train()
                settle()
            live.stage = FIRST
            with _autocast(recipe, model):
                loss = task.loss(model, task.dummy_batch(batch), CPU).loss_sum
            held, on_host = live.live, copies.bytes
            loss.backward()
    return ActivationBytes(live.peaks.get(FIRST, 0), live.peaks.get(DEEP, 0), held, on_host)


@contextmanager
def _autocast(recipe: Recipe, model: torch.nn.Module) -> Iterator[None]:
    dtype = getattr(torch, recipe.model.dtype)
    mixes = dtype != torch.float32 and needs_autocast(model, dtype)
    with torch.autocast("cpu", dtype) if mixes else nullcontext():
        yield


def _batch(recipe: Recipe) -> Batch:
    """Returns a micro-batch of full packs, every token a target. A pair of preferences is two rows."""
    packs = recipe.training.micro_batch
    pairs = packs if TASKS[recipe.task].learns_from == ("preference",) else 0
    shape = (packs + pairs, recipe.data.sequence_length)
    return Batch(
        index=0,
        input_ids=np.zeros(shape, np.int64),
        # Context parallelism reads the boundaries of samples: one sample for each pack.
        position_ids=np.tile(np.arange(shape[1]), (shape[0], 1)) * (recipe.strategy.context_parallel > 1),
        targets=np.ones(shape, np.bool_),
        labels=np.zeros(shape[0], np.int64),
        pairs=pairs,
        margins=np.zeros(pairs, np.float32),
        sources=np.zeros(packs, np.int64),
        target_sources=np.zeros(shape[0] * shape[1], np.int64),
    )
