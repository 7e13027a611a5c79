"""The interface of a strategy.

A strategy wraps the model, runs the backward of each micro-batch, steps the optimizer, and converts between its own
layout and full tensors. So a saved file never depends on the strategy or on the number of ranks.

Most strategies *average* gradients over the ranks, so that the loop multiplies its share of the loss by the number of
ranks. A strategy that sums them sets ``averages_gradients`` to False.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from trainer.distributed.world import World
from trainer.errors import InputError
from trainer.layers.find import decoder_layers
from trainer.precision import needs_autocast
from trainer.recipe.strategies import STRATEGIES, Mesh
from trainer.strategies.held import Itself
from trainer.strategies.optimizer_state import OptimizerState, set_group_lr
from trainer.strategies.shards import Kept, Sent, Weight, reduced_to_all

if TYPE_CHECKING:
    from trainer.recipe import Recipe
    from trainer.recipe.optimizers import OptimizerRow


@dataclass(frozen=True)
class ShardSlice:
    """The part of a parameter that this rank keeps: elements ``start`` to ``stop`` of the flattened full parameter of
    shape ``shape``. ``local`` contains them, flat, on the rank's device; it may be empty."""

    name: str
    shape: torch.Size
    start: int
    stop: int
    local: torch.Tensor


Fill = Callable[[Sequence[ShardSlice]], None]
MakeOptimizer = Callable[[Mapping[str, torch.nn.Parameter], frozenset[str]], torch.optim.Optimizer]
"""Makes the optimizer of named parameters. The set names the matrices that Muon, for example, updates as such."""


class Strategy(ABC):
    """One model on all ranks. Unless noted otherwise, every rank calls every method, in the same order."""

    model: torch.nn.Module  # the model without any wrapper: names and attributes are the model's own
    module: torch.nn.Module  # the (wrapped) model that the forward is called on
    optimizer: torch.optim.Optimizer
    averages_gradients = True
    gradient_size = 4
    """Bytes per element that are sent of a gradient."""

    forward_is_collective = False
    """True if a forward gathers parameters, so that every rank must run the same number of forwards."""

    def __init__(self, recipe: Recipe, world: World) -> None:
        self.recipe = recipe
        self.world = world
        self.mesh = Mesh.of(recipe, world.size)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=recipe.model.dtype == "float16")

    @classmethod
    def loads_sharded(cls, recipe: Recipe) -> bool:
        """Returns True if `setup` accepts a model on the meta device, where each rank fills its own slices."""
        return False

    @classmethod
    def kept(cls, weight: Weight, mesh: Mesh, rank: int) -> Kept:
        """Returns the elements of a parameter, its gradient and its optimizer state that a rank keeps: all of them,
        unless the strategy shards them."""
        return Kept(weight.numel, weight.numel, weight.numel)

    @classmethod
    def sent(cls, weight: Weight, mesh: Mesh, recipe: Recipe, micro_batches: int) -> Sent:
        """Returns the bytes that each rank sends for a parameter in a step of ``micro_batches`` on each rank: its
        gradient once, unless the strategy shards parameters."""
        size = cls.gradient_size * weight.numel if weight.trainable else 0
        return Sent(across=reduced_to_all(size, mesh.ranks))

    def setup(self, model: torch.nn.Module, make_optimizer: MakeOptimizer, fill: Fill | None = None) -> None:
        """Wraps ``model`` and makes the optimizer for its trainable parameters.

        Without ``fill``, the model has all its values, the same on every rank. With ``fill``, its parameters are on the
        meta device, and ``fill`` gets this rank's slices of all of them, in the same order on every rank."""
        self.model = model
        self.autocasts = self.needs_autocast(model)
        self.module = self.wrap(model)
        if fill:
            fill(self.materialise())
        matrices = self.matrices()
        self.held = self.hold(matrices)
        self.optimizer = make_optimizer({name: held.parameter for name, held in self.held.items()}, matrices)
        self._state = OptimizerState(self.optimizer, self.row, self.held, self.world, self.full_tensor, self.shard_like)
        if self.row.averages:
            self.optimizer.train()  # type: ignore[attr-defined]

    @property
    def row(self) -> OptimizerRow:
        return self.recipe.optimizer.row

    def matrices(self) -> frozenset[str]:
        """Returns the trained matrices of the decoder layers, if the optimizer treats them in another way than others.
        Embeddings and heads are none, nor are experts that are stacked in one tensor."""
        if self.row.holds != "matrices":
            return frozenset()
        inside = {id(p) for layer in decoder_layers(self.model) for p in layer.parameters()}
        found = frozenset(name for name, p in self.trainable().items() if p.ndim == 2 and id(p) in inside)
        if not found:
            raise InputError(
                f"optimizer.name {self.recipe.optimizer.name} updates matrices of the decoder layers, and "
                f"adapter.method {self.recipe.adapter.label} trains none; use adamw"
            )
        return found

    def hold(self, matrices: frozenset[str]) -> Mapping[str, Itself]:
        """Returns the form in which the optimizer holds each trainable parameter."""
        return {name: Itself(parameter) for name, parameter in self.trainable().items()}

    @abstractmethod
    def wrap(self, model: torch.nn.Module) -> torch.nn.Module: ...

    def materialise(self) -> Sequence[ShardSlice]:
        """Allocates memory for this rank's slices of a wrapped model on the meta device. Returns them, not filled."""
        raise NotImplementedError(f"{type(self).__name__} takes no model on the meta device")

    @abstractmethod
    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """Returns a context for forward and backward of one micro-batch. Gradients are exchanged only in the last
        micro-batch of a step."""

    def needs_autocast(self, model: torch.nn.Module) -> bool:
        """Returns True if a forward in the recipe's dtype uses parameters of other dtypes."""
        return self.dtype != torch.float32 and needs_autocast(model, self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.recipe.model.dtype)
        return dtype

    def autocast(self) -> AbstractContextManager[Any]:
        """Returns a context in which a forward computes in the recipe's dtype."""
        return torch.autocast(self.world.device.type, self.dtype) if self.autocasts else nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulates the gradients of ``loss``, which is scaled against underflow in float16."""
        self.scaler.scale(loss).backward()

    def step(self, lr: float, around: AbstractContextManager[Any] | None = None) -> float:
        """Updates the parameters with the learning rate ``lr``, after clipping the model's gradient to the recipe's
        norm. A step whose gradient is not finite is skipped.

        ``around``: a context for the update, entered when the gradient is complete and left before it is freed.
        Returns the gradient's norm before clipping."""
        set_lr(self.optimizer, lr)
        self.scaler.unscale_(self.optimizer)
        with around or nullcontext():
            norm = self.clip(self.max_norm)
            if self.scaler.is_enabled():
                self.scaler.step(self.optimizer)
                self.scaler.update()
            elif math.isfinite(norm):
                self.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.zero_grad(set_to_none=True)
        if self.row.named_by_user:
            self._state.check()
        return norm

    def update(self) -> None:
        self.optimizer.step()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Returns a context in which the model has the weights to evaluate and to save. An optimizer that averages
        (schedule-free) trains at other ones, which come back to the last bit."""
        if not self.row.averages:
            yield
            return
        trained = [p.detach().clone() for p in self.trainable().values()]
        optimizer: Any = self.optimizer
        optimizer.eval()
        try:
            yield
        finally:
            self.reshard()
            optimizer.train()
            with torch.no_grad():
                for parameter, values in zip(self.trainable().values(), trained, strict=True):
                    parameter.copy_(values)

    def reshard(self) -> None:  # noqa: B027 - no effect under most strategies
        """Shards parameters again after forwards that were not followed by a backward."""

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
        """Returns the full tensor for a tensor that may be sharded over the ranks."""

    def full_parameter(self, name: str) -> torch.Tensor:
        return self.full_tensor(self.model.get_parameter(name).detach())

    @abstractmethod
    def shard_like(self, whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Returns the full tensor ``whole``, the same on every rank, in the layout, device and dtype of ``like``."""

    def shape_of(self, parameter: torch.nn.Parameter) -> tuple[int, ...]:
        """Returns the shape of the full parameter."""
        return tuple(parameter.shape)

    def local_bytes(self) -> int:
        """Returns the bytes of the model's parameters that this rank keeps between steps. Not a collective."""
        local = [p.to_local() if hasattr(p, "to_local") else p for p in self.model.parameters()]
        return sum(int(p.numel() * p.element_size()) for p in local)

    @abstractmethod
    def wrapped(self) -> list[str]:
        """Returns the names of the modules that are wrapped, as found in the model. Not a collective."""

    @contextmanager
    def names_in_forward(self) -> Iterator[dict[int, str]]:
        """Yields the names of the parameters by the identity of the objects that a forward in the context uses: a
        strategy that gathers parameters puts other objects in their place. Not a collective."""
        seen: dict[int, str] = {}

        def note(prefix: str, module: torch.nn.Module) -> None:
            seen.update((id(parameter), f"{prefix}{name}") for name, parameter in module.named_parameters())

        gathered = {"", *self.wrapped()}
        hooks = [
            module.register_forward_pre_hook(lambda module, _, prefix=f"{name}." if name else "": note(prefix, module))
            for name, module in self.model.named_modules()
            if name in gathered
        ]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()

    def describe(self) -> dict[str, Any]:
        """Returns the strategy's fields of the start event."""
        total = sum(math.prod(self.shape_of(p)) * p.element_size() for p in self.model.parameters())
        return {
            "kind": self.recipe.strategy.kind,
            "mesh": self.mesh.to_json(),
            "wrapped": self.wrapped(),
            "total_bytes": total,
            "sharded_bytes": self.world.all_gather(self.local_bytes()),
        }

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields each trainable parameter as a full tensor on the CPU. Every rank iterates to the end."""
        for name, parameter in self.trainable().items():
            yield name, self.full_tensor(parameter.detach()).cpu()

    def load_weights(self, read: Callable[[str], torch.Tensor]) -> None:
        for name, parameter in self.trainable().items():
            with torch.no_grad():
                parameter.copy_(self.shard_like(read(name), parameter))

    def optimizer_state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the optimizer's state as full tensors on the CPU, named as in `trainer.strategies.optimizer_state`.
        Every rank iterates to the end."""
        return self._state.tensors()

    def load_optimizer_state(self, names: Mapping[str, list[str]], read: Callable[[str], torch.Tensor]) -> None:
        """Loads the optimizer's state. ``names``: the state keys that were saved for each parameter; ``read`` returns a
        full tensor by its saved name. Raises CorruptObject for the state of another model.

        Call it before `load_weights`: the state is allocated by an update that may change the sign of zeros."""
        self._state.load(names, read)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of each parameter group: ``lr`` times the group's ``lr_scale``, if it has one."""
    for group in optimizer.param_groups:
        set_group_lr(group, lr * group.get("lr_scale", 1.0))


def strategy_class(recipe: Recipe) -> type[Strategy]:
    if recipe.exact:
        from trainer.strategies.exact import ExactDDP

        return ExactDDP
    found: type[Strategy] = STRATEGIES.load(recipe.strategy.kind)
    return found


def make_strategy(recipe: Recipe, world: World) -> Strategy:
    return strategy_class(recipe)(recipe, world)
