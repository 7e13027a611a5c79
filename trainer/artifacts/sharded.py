"""Loading of a saved model that is not trained, sharded over the ranks by FSDP2, whatever the strategy of the run."""

from __future__ import annotations

import logging
from contextlib import closing
from typing import Any

import torch
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy
from torch.distributed.tensor import DTensor

from trainer.adapters.meta_init import take_values
from trainer.artifacts.load import attach, check_base, load, on_residual
from trainer.artifacts.locate import Artifact
from trainer.distributed.world import World
from trainer.errors import InputError
from trainer.model import fetch_model
from trainer.model.files.weight_source import WeightSource
from trainer.model.key_mapping import check_by_shard
from trainer.model.meta import NeedsFullLoad, meta_model, move_buffers
from trainer.model.placement import Placement
from trainer.model.sharded_load import RowReader, ShardLoader
from trainer.recipe.strategies import Mesh
from trainer.strategies.fsdp import allocate, device_mesh, shard

log = logging.getLogger(__name__)


def load_sharded(subject: Artifact, world: World, mesh: Mesh, *, offload: bool = False, seed: int = 0) -> Any:
    """Collective: returns the causal language model in evaluation mode. Each rank reads only the weights that it
    keeps, or, where that cannot be, all of them first. ``offload``: the shards stay in the host's memory.

    Raises InputError for int8 weights, which cannot be sharded, and like `trainer.artifacts.load`."""
    if subject.section.quantization == "int8":
        raise InputError(f"{subject.section.path} is loaded in int8, which cannot be sharded; use nf4, none, or ddp")
    policy = CPUOffloadPolicy(pin_memory=world.device.type != "cpu") if offload else OffloadPolicy()
    # All parameters, also those of the root, are given back after the forward: no backward needs them.
    settings = {
        "mesh": device_mesh(mesh, world.device),
        "offload_policy": policy,
        "reshard_after_forward": True,
    }
    try:
        return _by_shard(subject, world, settings, torch.device("cpu") if offload else world.device)
    except NeedsFullLoad as reason:
        if world.is_rank0:
            log.warning("each rank loads all of %s before it keeps its part: %s", subject.section.path, reason)
    model = load(subject, Placement.on(world.device), None, seed=seed).requires_grad_(False)
    shard(model, settings, settings)
    return model


def _by_shard(subject: Artifact, world: World, settings: dict[str, Any], kept_on: torch.device) -> Any:
    """Raises NeedsFullLoad before it has changed anything."""
    section, remote = subject.section, "://" in subject.section.path
    folder = fetch_model(section, weights=not remote).folder
    check_base(subject, folder)
    base: Any = meta_model(section, folder, world.device, full=False, checkpointing=False)
    check_by_shard(base, section.quantization, subject.method, from_base=on_residual(subject))
    with closing(WeightSource(section.path if remote else str(folder))) as source:
        weights = ShardLoader(base, source, section.path, world.device)
        if len(set(world.all_gather(weights.digest()))) > 1:
            raise InputError(f"{section.path} is not the same model on all hosts; copy it again")
        of_base = set(base.parameters())
        model = attach(subject, base).requires_grad_(False).eval()
        if any(p.is_meta and p not in of_base for p in model.parameters()):
            raise NeedsFullLoad(f"peft makes the adapter of {subject.method} on a base model with its weights")
        own = take_values(model)
        move_buffers(model, world.device)
        weights.attached(model)
        shard(model, settings, settings)

        def initial(name: str, shape: torch.Size, start: int, stop: int, rows: RowReader) -> torch.Tensor:
            return own.pop(name).reshape(-1)[start:stop]

        def full(name: str) -> torch.Tensor:
            parameter = model.get_parameter(name).detach()
            return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter

        weights.fill(allocate(model, kept_on), initial, full)
    return model
