"""DeepSpeed's ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054) on its own engine.

Stage 2 shards gradients and optimizer state, stage 3 also parameters: each parameter is flattened and cut into equal
slices, one per rank. The optimizer works on flat float32 partitions. A checkpoint gathers each parameter from its parts
in these partitions, and loading fills them again, so that the saved file does not depend on the partitioning.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import math
import os
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist

from trainer.errors import CorruptObject, InputError
from trainer.experts import expert_layers
from trainer.layers.find import decoder_layers
from trainer.layers.tiling import tiled_parts
from trainer.recipe.strategies import Mesh
from trainer.recipe.zero import zero_settings
from trainer.strategies.base import Fill, MakeOptimizer, ShardSlice, Strategy, set_lr
from trainer.strategies.optimizer_state import as_tensor, check_owners
from trainer.strategies.shards import Kept, Sent, Weight, gathered_itemsize, reduced_to_all
from trainer.strategies.zero_shards import cut, gathered, pieces

if TYPE_CHECKING:
    from trainer.recipe import Recipe

COMPILED_COLLECTIVES = "deepspeed_shm_comm"


@dataclass(frozen=True)
class Slice:
    """This rank's part of a parameter: elements ``[start, start + numel)`` of the flattened full parameter. They are
    stored from ``offset`` on in ``partition``, one of the flat float32 tensors that the optimizer updates. ``numel``
    may be 0."""

    partition: torch.Tensor
    offset: int
    start: int
    numel: int

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """Returns this part of a tensor that has the layout of the partition."""
        return flat.narrow(0, self.offset, self.numel)

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        return whole.reshape(-1).narrow(0, self.start if self.numel else 0, self.numel)


class Zero(Strategy):
    """Base class of both stages. ``optimizer`` is torch's; the engine has put flat partitions into its groups."""

    def setup(self, model: torch.nn.Module, make_optimizer: MakeOptimizer, fill: Fill | None = None) -> None:
        self.model = model
        deepspeed = import_deepspeed(self.world.device)
        if fill:
            fill(self.materialise())
        self.optimizer = make_optimizer(self.trainable(), frozenset())
        with _local_rank(self.world.device):
            self.engine, self.partitions, _, _ = deepspeed.initialize(
                model=model, optimizer=self.optimizer, config=self.config(), dist_init_required=False
            )
        self.module = _with_mode(self.engine)

    def wrap(self, model: torch.nn.Module) -> torch.nn.Module:
        raise AssertionError("the engine wraps model and optimizer together, in setup")

    def config(self) -> dict[str, Any]:
        """Returns DeepSpeed's configuration, with the ZeRO settings of the recipe's ``strategy.deepspeed``."""
        training, strategy = self.recipe.training, self.recipe.strategy
        return {
            "train_micro_batch_size_per_gpu": training.micro_batch,
            "gradient_accumulation_steps": 1,  # `micro_batch` marks the last micro-batch of a step instead
            "gradient_clipping": training.max_grad_norm or 0.0,
            "zero_optimization": zero_settings(strategy.kind, strategy.deepspeed),
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own would be compiled for minutes at the first start
            **self._precision(),
        }

    def _precision(self) -> dict[str, Any]:
        """Returns the settings of precision: full fine-tuning gathers its float32 parameters in the recipe's dtype.
        Adapters stay in float32, under autocast, as under every strategy."""
        dtype = self.recipe.model.dtype
        if dtype == "float32":
            return {}
        if self.recipe.adapter.method == "none":
            return {
                "bf16": {"enabled": True, "check_grad_overflow": True},
                "data_types": {"grad_accum_dtype": "fp32"},
            }
        return {"torch_autocast": {"enabled": True, "dtype": dtype, "lower_precision_safe_modules": []}}

    def autocast(self) -> AbstractContextManager[Any]:
        return nullcontext()  # the engine applies its own autocast around its forward

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        self.engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: torch.Tensor) -> None:
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self, lr: float, around: AbstractContextManager[Any] | None = None) -> float:
        set_lr(self.optimizer, lr)
        with around or nullcontext():
            self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def full_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the parts of a parameter are gathered by its slices")

    def shard_like(self, whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the parts of a parameter are cut by its slices")

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self.trainable().items():
            mine = self.slice_of(parameter)
            yield name, self._gather(parameter, mine, mine.partition)

    def load_weights(self, read: Callable[[str], torch.Tensor]) -> None:
        for name, parameter in self.trainable().items():
            whole, mine = read(name), self.slice_of(parameter)
            with torch.no_grad():
                mine.of(mine.partition).copy_(mine.cut(whole))
                self.fill(parameter, whole)

    def optimizer_state(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self.trainable().items():
            mine = self.slice_of(parameter)
            state = self.optimizer.state.get(mine.partition, {})
            for key in sorted(state):
                # A scalar is stored once per partition, and saved with each parameter as under other strategies.
                value = as_tensor(state[key])
                yield f"{name}.{key}", self._gather(parameter, mine, value) if value.ndim else value.cpu()

    def load_optimizer_state(self, names: Mapping[str, list[str]], read: Callable[[str], torch.Tensor]) -> None:
        check_owners(names, self.trainable())
        self.optimizer.state.clear()
        for name, parameter in self.trainable().items():
            mine = self.slice_of(parameter)
            for key in names.get(name, []):
                saved = f"{name}.{key}"
                self._load_state(mine, saved, key, read(saved), self.shape_of(parameter))

    def _load_state(self, mine: Slice, saved: str, key: str, value: torch.Tensor, shape: tuple[int, ...]) -> None:
        if value.ndim and tuple(value.shape) != shape:
            raise CorruptObject(f"{saved} is no part of the state that {self.recipe.optimizer.name} keeps under ZeRO")
        state = self.optimizer.state[mine.partition]
        if value.ndim:
            mine.of(state.setdefault(key, torch.zeros_like(mine.partition.data))).copy_(mine.cut(value))
        elif value.dtype == torch.int64:
            state[key] = int(value)
        else:  # torch's fused kernels count on the device
            state[key] = value.to(mine.partition.device) if self.optimizer.defaults.get("fused") else value.clone()

    def _gather(self, parameter: torch.nn.Parameter, mine: Slice, flat: torch.Tensor) -> torch.Tensor:
        """Returns the full tensor on the CPU; ``flat`` contains this rank's part of it. Collective."""
        shape = self.shape_of(parameter)
        whole = torch.zeros(math.prod(shape), dtype=flat.dtype, device=self.world.device)
        mine.cut(whole).copy_(mine.of(flat.detach()))
        dist.all_reduce(whole)
        return whole.view(shape).cpu()

    @abstractmethod
    def slice_of(self, parameter: Any) -> Slice: ...

    @abstractmethod
    def fill(self, parameter: Any, whole: torch.Tensor) -> None:
        """Copies the full tensor ``whole`` into the storage that the forward reads."""


class Zero2(Zero):
    """Stage 2: every rank has all parameters, and a flat float32 partition for each group of them."""

    @classmethod
    def kept(cls, weight: Weight, mesh: Mesh, rank: int) -> Kept:
        share = -(-weight.numel // mesh.ranks)
        return Kept(weight.numel, share, share)

    @classmethod
    def sent(cls, weight: Weight, mesh: Mesh, recipe: Recipe, micro_batches: int) -> Sent:
        # Buckets of gradients are reduced to all ranks in each micro-batch; updated parameters are gathered.
        if not weight.trainable:
            return Sent()
        size = weight.numel * gathered_itemsize(weight, recipe)
        return Sent(micro_batches * reduced_to_all(size, mesh.ranks) + size * (mesh.ranks - 1) // mesh.ranks)

    def setup(self, model: torch.nn.Module, make_optimizer: MakeOptimizer, fill: Fill | None = None) -> None:
        super().setup(model, make_optimizer, fill)
        groups: list[list[torch.nn.Parameter]] = self.partitions.bit16_groups
        self._group = {id(p): index for index, group in enumerate(groups) for p in group}

    def slice_of(self, parameter: Any) -> Slice:
        partition = self.partitions.single_partition_of_fp32_groups[self._group[id(parameter)]]
        mapping = parameter._hp_mapping
        if mapping is None:
            return Slice(partition, 0, 0, 0)
        here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
        return Slice(partition, there.start, here.start, here.numel)

    def fill(self, parameter: Any, whole: torch.Tensor) -> None:
        parameter.copy_(whole)

    def wrapped(self) -> list[str]:
        return [""] if self.partitions.partition_gradients else []


class Zero3(Zero):
    """Stage 3: each rank has a slice (``ds_tensor``) of each parameter. The parameter is gathered for the forward and
    the backward of its module, and empty otherwise."""

    forward_is_collective = True

    @classmethod
    def loads_sharded(cls, recipe: Recipe) -> bool:
        # In full fine-tuning below float32, the engine casts full parameters before it cuts them.
        return recipe.adapter.method != "none" or recipe.model.dtype == "float32"

    @classmethod
    def kept(cls, weight: Weight, mesh: Mesh, rank: int) -> Kept:
        share = -(-weight.numel // mesh.ranks)  # equal slices of the flattened parameter; the last ones are padded
        return Kept(share, share, share)

    @classmethod
    def sent(cls, weight: Weight, mesh: Mesh, recipe: Recipe, micro_batches: int) -> Sent:
        # Each micro-batch gathers a layer for its forward, for the second one of gradient checkpointing, and for its
        # backward, and scatters gradients. What embeddings and head gather is used again.
        times = (3 if recipe.training.gradient_checkpointing else 2) if weight.in_layer else 1
        share = -(-weight.numel // mesh.ranks) * gathered_itemsize(weight, recipe)
        return Sent(micro_batches * (times + weight.trainable) * (mesh.ranks - 1) * share)

    def materialise(self) -> list[ShardSlice]:
        with _local_rank(self.world.device):
            cut(import_deepspeed(self.world.device), self.model, self.config(), self.world.device)
        return pieces(self.model, self.world.rank)

    def full_parameter(self, name: str) -> torch.Tensor:
        return gathered(self.model.get_parameter(name), self.world.rank, self.world.device)

    def setup(self, model: torch.nn.Module, make_optimizer: MakeOptimizer, fill: Fill | None = None) -> None:
        deepspeed = import_deepspeed(self.world.device)
        # Gathered once, with all modules inside them: ranks have different numbers of tiles, or of an expert's tokens.
        for part in (*expert_layers(model), *tiled_parts(model)):
            deepspeed.utils.set_z3_leaf_module(part, True)
        super().setup(model, make_optimizer, fill)
        for parameter in model.parameters():
            if type(parameter).__name__ == "Params4bit":
                # On CPUs peft's DoRA calls `to` on a 4-bit weight and puts the copy in its place: a parameter that
                # DeepSpeed does not know.
                parameter.to = lambda *_, _same=parameter, **__: _same  # type: ignore[method-assign]

    def reshard(self) -> None:
        # A forward that an error has ended leaves parameters gathered, which DeepSpeed does not expect in the next one.
        self.engine.empty_partition_cache()

    def slice_of(self, parameter: Any) -> Slice:
        group, offset, size = self.partitions.grad_position[self.partitions.get_param_id(parameter)]
        partition = self.partitions.fp32_partitioned_groups_flat[group]
        start = self.world.rank * size
        numel = max(0, min(size, math.prod(self.shape_of(parameter)) - start))  # the last slices hold padding
        return Slice(partition, offset, start, numel)

    def fill(self, parameter: Any, whole: torch.Tensor) -> None:
        mine = self.slice_of(parameter)
        parameter.ds_tensor.narrow(0, 0, mine.numel).copy_(mine.cut(whole))
        if parameter.numel():  # currently gathered: it persists, or a forward has just ended
            parameter.copy_(whole)

    def shape_of(self, parameter: torch.nn.Parameter) -> tuple[int, ...]:
        shape: Any = parameter.ds_shape  # type: ignore[attr-defined]
        return tuple(shape)

    def local_bytes(self) -> int:
        kept = 0  # slices, plus the small parameters that stay gathered (`stage3_param_persistence_threshold`)
        parameters: Iterator[Any] = self.model.parameters()
        for parameter in parameters:
            elements = parameter.ds_tensor.numel() + (parameter.ds_numel if parameter.ds_persist else 0)
            kept += elements * parameter.element_size()
        return kept

    def wrapped(self) -> list[str]:
        """Returns the names of the decoder layers and of the root ("") whose parameters are all slices."""
        layers = {id(layer) for layer in decoder_layers(self.model)}
        found = [(name, module) for name, module in self.model.named_modules() if id(module) in layers or not name]
        return [name for name, module in found if all(hasattr(p, "ds_tensor") for p in module.parameters())]


def import_deepspeed(device: torch.device) -> Any:
    """Imports DeepSpeed and selects its accelerator. Raises InputError if it is not installed, or has selected another
    accelerator."""
    try:
        importlib.metadata.version("deepspeed")  # a folder of that name can be imported without the library
    except importlib.metadata.PackageNotFoundError:
        raise InputError("strategy.kind zero2 and zero3 need DeepSpeed: pip install deepspeed, or use fsdp") from None
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    if device.type == "cpu":  # use gloo: DeepSpeed's own collectives would be compiled for minutes at the first start
        ops: Any = importlib.import_module("deepspeed.ops")
        ops.__compatible_ops__[COMPILED_COLLECTIVES] = False
    chosen = get_accelerator().device_name().split(":")[0]
    if chosen != device.type:
        raise InputError(f"DeepSpeed has chosen the accelerator {chosen!r}: set DS_ACCELERATOR={device.type}")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed uses a name that torch has deprecated, which would warn at every collective.
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
    return deepspeed


def _with_mode(engine: Any) -> torch.nn.Module:
    """Returns the engine, whose ``training`` now follows `train` and `eval`: DeepSpeed only passes these on to the
    model, and everything that asks the module for its mode would always find it in training."""
    train = engine.train

    def switch(mode: bool = True) -> torch.nn.Module:
        train(mode)
        engine.training = mode
        return cast("torch.nn.Module", engine)

    engine.train, engine.eval = switch, partial(switch, False)
    return switch(engine.module.training)


@contextmanager
def _local_rank(device: torch.device) -> Iterator[None]:
    """Sets LOCAL_RANK to this process's device index inside the context."""
    # DeepSpeed takes its device from LOCAL_RANK, which counts processes, not the devices that this process can see.
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    try:
        yield
    finally:
        if before is not None:  # a single process has none; it stays set, because DeepSpeed reads it again later
            os.environ["LOCAL_RANK"] = before
