"""The strategies of runs that share a base model.

One *host* strategy spreads the base model over the ranks, with the adapters of all runs in it. Each run has a strategy
of its own kind for its adapter's parameters: gradients, clipping, optimizer, checkpoints. Its forward and backward are
those of the shared base model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from trainer.distributed.world import World
from trainer.strategies.base import Fill, MakeOptimizer, Strategy, strategy_class
from trainer.strategies.ddp import DDP
from trainer.strategies.exact import ExactDDP
from trainer.strategies.fsdp import FSDP
from trainer.tasks.lm_head_loss import TargetHead
from trainer.worker.together.random_state import RandomState
from trainer.worker.together.shared_base import JOINED, Backward, Forward, SharedBase
from trainer.worker.together.turns import BACKWARD, EVALUATION, TRAINING, ModelPass, Turns

if TYPE_CHECKING:
    from trainer.recipe import Recipe


class HostFSDP(FSDP):
    """Shards the shared base model. The runs have the optimizers."""

    def setup(self, model: torch.nn.Module, make_optimizer: MakeOptimizer, fill: Fill | None = None) -> None:
        self.model, self.module = model, self.wrap(model)
        if fill:
            fill(self.materialise())

    def synchronise(self, last: bool) -> None:
        assert isinstance(self.module, FSDPModule)
        self.module.set_requires_gradient_sync(last)


class HostDDP(DDP):
    """Leaves the shared base model whole on each rank. The runs exchange their gradients."""

    def setup(self, model: torch.nn.Module, make_optimizer: MakeOptimizer, fill: Fill | None = None) -> None:
        self.model = self.module = model

    def synchronise(self, last: bool) -> None:
        pass


def make_host(recipe: Recipe, world: World) -> HostFSDP | HostDDP:
    return (HostFSDP if issubclass(strategy_class(recipe), FSDP) else HostDDP)(recipe, world)


class RunModel(torch.nn.Module):
    """The model of one run, as its loop and its task call it. ``model``: the run's model without weights, with its
    adapter; ``layers``: the LoRA layers, by the names of the layers that they adapt; ``head``: of the run's task."""

    def __init__(
        self,
        model: torch.nn.Module,
        layers: Mapping[str, Any],
        head: TargetHead,
        base: SharedBase,
        turns: Turns[Any],
        run: int,
    ) -> None:
        super().__init__()
        self.model = model
        self._layers, self._head, self._base, self._turns, self._run = layers, head, base, turns, run

    def forward(self, **inputs: Any) -> Any:
        device = inputs["input_ids"].device
        random = RandomState(device, keeps=self._base.recomputes)
        autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        gradients = torch.is_grad_enabled()
        asked = Forward(inputs, self._layers, self._head, random, self.training, gradients, autocast)
        # A forward with other arguments, such as a KV cache, cannot be joined with those of other runs.
        alone = None if set(inputs) <= JOINED and not inputs.get("use_cache") else self._run
        kind = (alone, self.training, gradients, autocast, *sorted(inputs))
        answer = self._turns.wait_for(ModelPass(TRAINING if self.training else EVALUATION, kind, asked))
        random.leave()
        return answer


class OfRun(Strategy):
    """The common part of the strategies of runs. ``layers``, ``head``: see `RunModel`; set before `setup`."""

    layers: Mapping[str, Any]
    head: TargetHead

    def __init__(
        self, recipe: Recipe, world: World, host: Strategy, base: SharedBase, turns: Turns[Any], run: int
    ) -> None:
        super().__init__(recipe, world)
        self._host, self._base, self._turns, self._run = host, base, turns, run
        self._last = False

    def wrap(self, model: torch.nn.Module) -> torch.nn.Module:
        return RunModel(model, self.layers, self.head, self._base, self._turns, self._run)

    def backward(self, loss: torch.Tensor) -> None:
        self._turns.wait_for(ModelPass(BACKWARD, None, Backward(self.scaler.scale(loss), self._last)))

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        self._last = last
        yield

    def reshard(self) -> None:
        self._host.reshard()

    def wrapped(self) -> list[str]:
        return self._host.wrapped()

    @contextmanager
    def names_in_forward(self) -> Iterator[dict[int, str]]:
        names = {id(module): name for name, module in self.model.named_modules()}
        seen: dict[int, str] = {}

        def note(layer: Any) -> None:
            seen.update((id(p), f"{names[id(layer)]}.{name}") for name, p in layer.named_parameters())

        with self._base.noting(note):
            yield seen

    def describe(self) -> dict[str, Any]:
        return self._host.describe()


class FSDPOfRun(OfRun, FSDP):
    pass


class DDPOfRun(OfRun, DDP):
    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        with super().micro_batch(last):
            yield
        if last and self.world.size > 1:
            self._average_gradients()

    def _average_gradients(self) -> None:
        """Averages the gradients over the ranks, in one exchange. Collective."""
        gradients = [p.grad for p in self.trainable().values() if p.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients]) / self.world.size
        dist.all_reduce(flat)
        sizes = [gradient.numel() for gradient in gradients]
        for gradient, mean in zip(gradients, flat.split(sizes), strict=True):
            gradient.copy_(mean.view_as(gradient))


class ExactDDPOfRun(OfRun, ExactDDP):
    def wrap(self, model: torch.nn.Module) -> torch.nn.Module:
        ExactDDP.wrap(self, model)
        return OfRun.wrap(self, model)

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        with ExactDDP.micro_batch(self, last):
            yield


def strategy_of_run(
    recipe: Recipe, world: World, host: Strategy, base: SharedBase, turns: Turns[Any], run: int
) -> OfRun:
    kinds: dict[type[Strategy], type[OfRun]] = {FSDP: FSDPOfRun, ExactDDP: ExactDDPOfRun, DDP: DDPOfRun}
    return kinds[strategy_class(recipe)](recipe, world, host, base, turns, run)
