"""The seam of a strategy.

A strategy wraps the model, runs the backward of each micro-batch, steps the optimizer, and moves whole tensors in and
out of whatever layout it keeps them in: what is saved never depends on the strategy or on the number of ranks.

Most strategies *average* gradients over the ranks, so that the loop multiplies its share of the loss by the number of
ranks; one that adds them says so (``averages_gradients``).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from trainer.distributed.world import World
from trainer.precision import needs_autocast
from trainer.registry import STRATEGIES
from trainer.strategies.optimizer_state import load_optimizer_state, optimizer_state

if TYPE_CHECKING:
    from trainer.recipe import Recipe


@dataclass(frozen=True)
class ShardSlice:
    """What this rank keeps of a parameter: elements ``start`` to ``stop`` of the flattened whole, which has ``shape``.
    ``local`` holds them, flat, on the rank's device; it may be empty."""

    name: str
    shape: torch.Size
    start: int
    stop: int
    local: torch.Tensor


Fill = Callable[[Sequence[ShardSlice]], None]
MakeOptimizer = Callable[[Mapping[str, torch.nn.Parameter]], torch.optim.Optimizer]


class Strategy(ABC):
    """One model on all ranks. Every method is called by every rank, in the same order, unless it says otherwise."""

    model: torch.nn.Module  # the model without any wrapper: names and attributes are the model's own
    module: torch.nn.Module  # what the forward is called on
    optimizer: torch.optim.Optimizer
    averages_gradients = True

    forward_is_collective = False
    """Whether a forward gathers parameters, so that every rank has to run as many."""

    def __init__(self, recipe: Recipe, world: World) -> None:
        self.recipe = recipe
        self.world = world
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=recipe.model.dtype == "float16")

    @classmethod
    def loads_sharded(cls, recipe: Recipe) -> bool:
        """Whether `setup` takes a model on the meta device, of which each rank then fills its own pieces."""
        return False

    def setup(self, model: torch.nn.Module, make_optimizer: MakeOptimizer, fill: Fill | None = None) -> None:
        """Takes over ``model`` and makes the optimizer over what is trained.

        The model is whole, with the same values on every rank; or, with ``fill``, its parameters are on the meta
        device, and ``fill`` gets this rank's pieces of all of them, in the same order on every rank."""
        self.model = model
        self.autocasts = self.needs_autocast(model)
        self.module = self.wrap(model)
        if fill:
            fill(self.materialise())
        self.optimizer = make_optimizer(self.trainable())

    @abstractmethod
    def wrap(self, model: torch.nn.Module) -> torch.nn.Module: ...

    def materialise(self) -> Sequence[ShardSlice]:
        """Memory on the rank's device for what it keeps of a wrapped model on the meta device; not filled yet."""
        raise NotImplementedError(f"{type(self).__name__} takes no model on the meta device")

    @abstractmethod
    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """Surrounds forward and backward of one micro-batch; gradients are exchanged in the last one of a step only."""

    def needs_autocast(self, model: torch.nn.Module) -> bool:
        """Whether a forward in the recipe's dtype meets parameters of other ones."""
        return self.dtype != torch.float32 and needs_autocast(model, self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.recipe.model.dtype)
        return dtype

    def autocast(self) -> AbstractContextManager[Any]:
        """Surrounds a forward: it computes in the recipe's dtype."""
        return torch.autocast(self.world.device.type, self.dtype) if self.autocasts else nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        """Adds this micro-batch's gradients: of ``loss``, in float16 scaled against underflow."""
        self.scaler.scale(loss).backward()

    def step(self, lr: float, around: AbstractContextManager[Any] | None = None) -> float:
        """One update with the learning rate ``lr``, the gradient of the whole model clipped to the recipe's norm.

        ``around`` surrounds it: from when the gradient is whole until it is thrown away. Returns the gradient's norm
        before clipping; a step whose gradient is not finite is left out."""
        set_lr(self.optimizer, lr)
        self.scaler.unscale_(self.optimizer)
        with around or nullcontext():
            norm = self.clip(self.max_norm)
            if self.scaler.is_enabled():
                self.scaler.step(self.optimizer)
                self.scaler.update()
            elif math.isfinite(norm):
                self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def reshard(self) -> None:  # noqa: B027 - most strategies have nothing to do here
        """Puts parameters back where they lie between steps, after forwards that no backward followed."""

    @property
    def max_norm(self) -> float:
        norm = self.recipe.training.max_grad_norm
        return float("inf") if norm is None else norm

    def clip(self, max_norm: float) -> float:
        parameters = [p for p in self.trainable().values() if p.grad is not None]
        return float(self.full_tensor(torch.nn.utils.clip_grad_norm_(parameters, max_norm)))

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def trainable_elements(self) -> int:
        return sum(math.prod(self.shape_of(p)) for p in self.trainable().values())

    @abstractmethod
    def full_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """The whole of a tensor that may be spread over the ranks."""

    def full_parameter(self, name: str) -> torch.Tensor:
        return self.full_tensor(self.model.get_parameter(name).detach())

    @abstractmethod
    def shard_like(self, whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """The inverse: ``full_tensor`` (the same on every rank) in the layout, device and dtype of ``like``."""

    def shape_of(self, parameter: torch.nn.Parameter) -> tuple[int, ...]:
        """The shape of the whole parameter."""
        return tuple(parameter.shape)

    def local_bytes(self) -> int:
        """Bytes of the model's parameters that this rank keeps between steps. No collective."""
        return sum(_bytes(p) for p in self.model.parameters())

    @abstractmethod
    def wrapped(self) -> list[str]:
        """The modules that were really wrapped, read off the model. No collective."""

    def describe(self) -> dict[str, Any]:
        """What the start event says about the strategy."""
        total = sum(math.prod(self.shape_of(p)) * p.element_size() for p in self.model.parameters())
        return {
            "kind": self.recipe.strategy.kind,
            "wrapped": self.wrapped(),
            "total_bytes": total,
            "sharded_bytes": self.world.all_gather(self.local_bytes()),
        }

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each trainable parameter, whole, on the CPU."""
        for name, parameter in self.trainable().items():
            yield name, self.full_tensor(parameter.detach()).cpu()

    def load_weights(self, read: Callable[[str], torch.Tensor]) -> None:
        for name, parameter in self.trainable().items():
            with torch.no_grad():
                parameter.copy_(self.shard_like(read(name), parameter))

    def optimizer_state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The optimizer's state, as ``optimizer_state`` (the module) names it: whole tensors on the CPU."""
        return optimizer_state(self.optimizer, self.trainable(), self.full_tensor)

    def load_optimizer_state(self, names: Mapping[str, list[str]], read: Callable[[str], torch.Tensor]) -> None:
        """``names``: the state keys that were saved for each parameter. Raises CorruptObject for foreign state."""
        load_optimizer_state(self.optimizer, self.trainable(), names, read, self.shard_like)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The step's learning rate, in each group times its ``lr_scale``, where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def _bytes(parameter: torch.Tensor) -> int:
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return int(local.numel() * local.element_size())


def make_strategy(recipe: Recipe, world: World) -> Strategy:
    if recipe.exact:
        from trainer.strategies.exact import ExactDDP

        return ExactDDP(recipe, world)
    strategy: Strategy = STRATEGIES.load(recipe.strategy.kind)(recipe, world)
    return strategy
