"""FSDP2 (torch's ``fully_shard``): parameters, gradients and optimizer state are sharded over the ranks.

Each decoder layer is one group, which is gathered for its forward and again for its backward. All other parameters
belong to the group of the root, also those that several layers share: a group of each layer would make copies of them,
which training would move apart."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from trainer.layers.find import separate_blocks
from trainer.recipe.strategies import Mesh
from trainer.strategies.base import ShardSlice, Strategy
from trainer.strategies.held import Complete, HeldPart, Itself, Shard, owners
from trainer.strategies.shards import Kept, Sent, Weight, chunk_rows, gathered_itemsize, reduced_to_all

if TYPE_CHECKING:
    from trainer.recipe import Recipe


class FSDP(Strategy):
    forward_is_collective = True

    @classmethod
    def loads_sharded(cls, recipe: Recipe) -> bool:
        return True

    @classmethod
    def kept(cls, weight: Weight, mesh: Mesh, rank: int) -> Kept:
        # FSDP2 splits the first dimension as torch.chunk does, so that the last ranks may get fewer rows or none, and
        # allocates the largest chunk on every rank.
        rows, rest, ranks = weight.shape[0], math.prod(weight.shape[1:]), mesh.ranks_per_replica
        mine = chunk_rows(rows, ranks, mesh.shard_rank(rank)) * rest
        return Kept(mine, mine, mine, chunk_rows(rows, ranks, 0) * rest - mine)

    @classmethod
    def sent(cls, weight: Weight, mesh: Mesh, recipe: Recipe, micro_batches: int) -> Sent:
        # Each micro-batch gathers the largest chunk from every rank, a layer's for its backward again. Gradients are
        # exchanged in the last one only.
        others = mesh.ranks_per_replica - 1
        chunk = chunk_rows(weight.shape[0], mesh.ranks_per_replica, 0) * math.prod(weight.shape[1:])
        times = micro_batches * (2 if weight.in_layer and recipe.strategy.reshard_after_forward else 1)
        inside = times * others * chunk * gathered_itemsize(weight, recipe)
        if not weight.trainable:
            return Sent(inside)
        gradient = chunk * cls.gradient_size
        return Sent(inside + others * gradient, reduced_to_all(gradient, mesh.replicas))

    def wrap(self, model: torch.nn.Module) -> torch.nn.Module:
        offload = OffloadPolicy()
        if self.recipe.strategy.offload:
            offload = CPUOffloadPolicy(pin_memory=self.world.device.type != "cpu")
        settings: dict[str, Any] = {
            "mesh": device_mesh(self.mesh, self.world.device),
            "mp_policy": self._precision(),
            "offload_policy": offload,
        }
        # No `reshard_after_forward`: the root's parameters are needed again at once, so they stay for the backward.
        shard(model, {"reshard_after_forward": self.recipe.strategy.reshard_after_forward, **settings}, settings)
        return model

    def materialise(self) -> list[ShardSlice]:
        return allocate(self.model, torch.device("cpu") if self.recipe.strategy.offload else self.world.device)

    def needs_autocast(self, model: torch.nn.Module) -> bool:
        return self._precision().param_dtype is None and super().needs_autocast(model)

    def _precision(self) -> MixedPrecisionPolicy:
        """Returns the policy that gathers the float32 parameters of full fine-tuning in the recipe's dtype."""
        # Adapters are not cast: they are small, and a cast would also change the packed bytes of a quantised base.
        if self.recipe.adapter.method != "none" or self.recipe.model.dtype == "float32":
            return MixedPrecisionPolicy()
        return MixedPrecisionPolicy(self.dtype, reduce_dtype=torch.float32)

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        assert isinstance(self.module, FSDPModule)
        self.module.set_requires_gradient_sync(last)
        yield

    def hold(self, matrices: frozenset[str]) -> dict[str, Itself]:
        form, trainable = self.row.holds, self.trainable()
        if form == "shards":
            saved = self.world.rank < self.mesh.ranks_per_replica
            parts = {name: _piece(name, p) for name, p in trainable.items()}
            return {n: Shard(p, HeldPart(parts[n].start, parts[n].local.numel(), saved)) for n, p in trainable.items()}
        complete = {name: p for name, p in trainable.items() if form == "complete" or name in matrices}
        owned_by = owners(complete, self.world.size)
        rank, device = self.world.rank, self.world.device
        return {
            name: Complete(p, owned_by[name], owned_by[name] == rank, device) if name in complete else Itself(p)
            for name, p in trainable.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        complete: dict[int, list[Complete]] = {}
        for held in self.held.values():
            if isinstance(held, Complete):
                complete.setdefault(held.owner, []).append(held)
            elif isinstance(held, Shard):
                held.take()
        if complete:
            self._update_complete([list(filter(None, turn)) for turn in zip_longest(*complete.values())])
        super().update()

    def _update_complete(self, turns: Sequence[Sequence[Complete]]) -> None:
        """Updates complete parameters, in each turn one per rank. Collective."""
        gradients = {p: p.grad for p in self.trainable().values()}
        for parameter in gradients:  # the optimizer must not update those that it holds in another form here
            parameter.grad = None
        for turn in turns:
            for held in turn:
                if (gradient := gradients[held.source]) is not None:
                    full = self.full_tensor(held.source.detach()), self.full_tensor(gradient)
                    if held.mine:
                        held.take(*full)
            if any(held.mine for held in turn):
                self.optimizer.step()
            for held in turn:
                self._receive(held)
        for parameter, gradient in gradients.items():
            parameter.grad = gradient

    def _receive(self, held: Complete) -> None:
        source: torch.Tensor = held.source
        values = held.parameter.detach()
        if not held.mine:
            values = torch.empty(source.shape, dtype=source.dtype, device=self.world.device)
        dist.broadcast(values, src=held.owner)
        source.copy_(self.shard_like(values, source))
        held.close()

    def reshard(self) -> None:
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def full_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, DTensor):
            return tensor
        return _with_local(tensor, tensor.to_local().to(self.world.device)).full_tensor()

    def shard_like(self, whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        if not isinstance(like, DTensor):
            return whole.to(device=like.device, dtype=like.dtype)
        whole = whole.to(device=self.world.device, dtype=like.dtype)
        # src_data_rank=None: each rank cuts its own shard without communication, since all have read the same bytes.
        cut = distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
        return _with_local(like, cut.to_local().to(like.to_local().device))

    def wrapped(self) -> list[str]:
        return [n for n, m in self.model.named_modules() if isinstance(m, FSDPModule)]


def device_mesh(mesh: Mesh, device: torch.device) -> DeviceMesh:
    """Returns the mesh for `fully_shard`, which replicates over the first axis of two and shards over the last."""
    size = mesh.ranks_per_replica
    if mesh.replicas == 1:
        return init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (mesh.replicas, size), mesh_dim_names=("replica", "shard"))


def shard(model: torch.nn.Module, block: dict[str, Any], root: dict[str, Any]) -> None:
    """Shards the model in place, with these settings of `fully_shard` for each decoder layer and for the root."""
    for part in separate_blocks(model):
        fully_shard(part, **block)
    fully_shard(model, **root)
    unsharded = [n for n, p in model.named_parameters() if not isinstance(p, DTensor)]
    assert not unsharded, f"fully_shard left {unsharded[:3]} whole"


def allocate(model: torch.nn.Module, device: torch.device) -> list[ShardSlice]:
    """Allocates memory for this rank's slices of a sharded model on the meta device. Returns them, not filled."""
    # Not `to_empty`, which would discard buffers that already have values. Tied parameters stay tied.
    model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t)
    return [_piece(name, parameter) for name, parameter in model.named_parameters()]


def _piece(name: str, parameter: torch.Tensor) -> ShardSlice:
    """Returns this rank's slice of a sharded parameter."""
    assert isinstance(parameter, DTensor)
    # FSDP2 cuts along the first dimension into chunks of equal size; the last ranks may have fewer rows or none.
    mesh, row = parameter.device_mesh["shard"], parameter.shape[1:].numel()
    rows_per_rank = -(-parameter.shape[0] // mesh.size())
    start = min(mesh.get_local_rank() * rows_per_rank, parameter.shape[0])
    # As a plain tensor: bitsandbytes' tensor subclass would quantise the values that are copied into it.
    local = parameter.to_local().detach().as_subclass(torch.Tensor).view(-1)
    return ShardSlice(name, parameter.shape, start * row, start * row + local.numel(), local)


def _with_local(tensor: DTensor, local: torch.Tensor) -> DTensor:
    """Returns ``tensor`` with another local part. Offloaded parts are on the host, but collectives need the device."""
    return DTensor.from_local(
        local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
