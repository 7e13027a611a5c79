"""Builds the parts of a rank: base model, adapter, task, and the strategy that shards the model over the ranks.

There are two loaders. With `ShardedLoader` no rank ever holds more of the base model than it keeps; strategies that
shard parameters use it wherever adapter, task and architecture allow. With `WholeLoader` each rank loads all of it.
"""

from __future__ import annotations

import gc
import logging
import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from trainer.adapters import Adapter, make_adapter
from trainer.adapters.coverage import Coverage, coverage_of
from trainer.artifacts.teacher import teacher_of
from trainer.data.formats.dialogue import dialogue_of
from trainer.distributed.world import World
from trainer.errors import InputError, MusterError
from trainer.layers import change_layers
from trainer.layers.tiling import Tiles
from trainer.model import (
    Head,
    ModelFiles,
    check_isolation,
    check_left_to_right,
    check_tiles,
    fetch_model,
    load_tokenizer,
)
from trainer.model import build as load_base
from trainer.model.files.weight_source import WeightSource
from trainer.model.kernels.attention import settle_attention
from trainer.model.kernels.context import Context, settle_context
from trainer.model.kernels.liger import use_liger
from trainer.model.key_mapping import check_by_shard
from trainer.model.meta import NeedsFullLoad, meta_model, move_buffers
from trainer.model.peak_rss import HostPeak
from trainer.model.prequantised import copy_of
from trainer.model.sharded_load import RowReader, ShardLoader
from trainer.optim import make_optimizer
from trainer.recipe import ModelSection, Recipe
from trainer.run import layout
from trainer.run.failure import COLLECTIVE
from trainer.storage import Storage
from trainer.strategies import Strategy, make_strategy
from trainer.tasks import GenerationContext, Task, make_task
from trainer.worker.mfu import Meter, meter_of, operations_of
from trainer.worker.start.unused import UnusedTargets, check_used

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trainer.tasks.distill.teacher import Teacher

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """``meter``: None if the MFU cannot be computed. ``attention``: the name of the attention kernel. ``load``: for
    each rank, the bytes of the base model that it read, those of them that no cache of the host had, and the peak of
    its host memory during the load."""

    recipe: Recipe
    world: World
    files: ModelFiles
    adapter: Adapter
    task: Task
    strategy: Strategy
    meter: Meter | None
    attention: str
    coverage: Coverage
    load: list[dict[str, int]]
    chat_template: str | None = None

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Loads the base model's tokenizer, with the run's chat template."""
        return _tokenizer(self.recipe, self.files.folder, self.chat_template)


def build(
    recipe: Recipe,
    world: World,
    storage: Storage,
    labels: tuple[str, ...] = (),
    reward: Any = None,
    chat_template: str | None = None,
    stored_teacher: Teacher | None = None,
) -> Parts:
    """Collective: every rank of the attempt calls it. ``storage``: the run's, which may have an NF4 copy of the model.
    ``labels``: the label set of the training data. ``reward``: the reward model of a task that generates texts, if it
    has one. ``chat_template``: the run's own, None for the tokenizer's. ``stored_teacher``: takes the place of the
    recipe's teacher, which is then not loaded."""
    teacher = stored_teacher or teacher_of(recipe, world.device, world)
    parts = partial(_build, recipe, world, storage, labels, reward, chat_template, teacher)
    try:
        return parts(frozenset())
    except UnusedTargets as unused:
        left_out = frozenset(unused.names)
    if world.is_rank0:
        log.warning(
            "%d layers get no adapter, since the loss does not depend on them: %s",
            len(left_out),
            ", ".join(sorted({re.sub(r"\.\d+\.", ".*.", name) for name in left_out})),
        )
    gc.collect()  # the model that was built first
    return parts(left_out)


def _build(
    recipe: Recipe,
    world: World,
    storage: Storage,
    labels: tuple[str, ...],
    reward: Any,
    chat_template: str | None,
    teacher: Any,
    left_out: frozenset[str],
) -> Parts:
    """Raises UnusedTargets for layers besides ``left_out`` that take no part in the loss."""
    adapter, task, strategy = make_adapter(recipe), make_task(recipe, labels), make_strategy(recipe, world)
    adapter.left_out, task.world, task.teacher = left_out, world, teacher
    with closing(loader_of(recipe, world, storage, adapter, task, strategy)) as loader:
        if recipe.compute.kernels == "liger":
            use_liger(loader.base)
        model = loader.attach_adapter()
        generation = None
        if task.generates:
            tokenizer = _tokenizer(recipe, loader.files.folder, chat_template)
            dialogue = dialogue_of(recipe, tokenizer, chat_template)
            generation = GenerationContext(tokenizer, world, strategy.forward_is_collective, reward, dialogue)
        coverage = coverage_of(model)
        task.attach(model, generation)
        # Counted before the strategy wraps the model: some strategies leave empty parameters behind.
        operations = operations_of(model)
        if recipe.compute.offload_activations and world.device.type == "cpu" and world.is_rank0:
            log.warning("compute.offload_activations has no effect on a CPU, whose memory is the host's")
        tiles = change_layers(model, recipe.compute, world.device)
        loader.setup_strategy(model)
        attention = settle_model(recipe, world, strategy, task, strategy.model, tiles)
        with as_told(recipe, strategy.model):
            check_used(recipe, world, adapter, task, strategy)
        load = world.all_gather({"rank": world.rank, **loader.statistics()})
    meter = meter_of(recipe, world, operations)
    parts = (loader.files, adapter, task, strategy, meter, attention, coverage, load)
    return Parts(recipe, world, *parts, chat_template)


def settle_model(
    recipe: Recipe, world: World, strategy: Strategy, task: Task, model: torch.nn.Module, tiles: Tiles | None
) -> str:
    """Collective: sets the attention kernel on ``model``, which ``strategy.module`` computes with, and checks that the
    model reads texts as training does. Returns the kernel's name."""
    with as_told(recipe, model), strategy.autocast():
        attention = settle_attention(recipe, model, strategy.module, task.inputs, world.device)
        strategy.reshard()
        asked = model, strategy.module, task.inputs, world.device, recipe.model.path
        length = recipe.data.sequence_length
        if tiles is not None:
            check_tiles(*asked, tiles)
        if task.head is not None:
            check_left_to_right(*asked, length)
        if recipe.data.packing:
            check_isolation(*asked, length)
        if strategy.mesh.context > 1:
            context = Context.of(strategy.mesh, world.device)
            strategy.reshard()
            settle_context(recipe, *asked[:2], context, task.inputs, attention, world)
            task.compute_together(context)
    strategy.reshard()
    return attention


@contextmanager
def as_told(recipe: Recipe, model: Any) -> Iterator[None]:
    """Names the quantisation where a quantised model's forward fails: its code may read weights outside of layers."""
    try:
        yield
    except (RuntimeError, ValueError, KeyError) as error:
        kind = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
        if recipe.model.quantization == "none" or isinstance(error, torch.OutOfMemoryError | MusterError):
            raise
        if COLLECTIVE.search(str(error)):
            raise
        raise InputError(
            f"model.quantization {recipe.model.quantization} does not work for {kind}: its forward fails with "
            f"{' '.join(str(error).split())[:200]}; use model.quantization: none"
        ) from error


class BaseLoader(Protocol):
    """Loads the base model for one strategy; `build` calls the methods in this order.

    ``files``: the base model's folder on this host. ``base``: the model without its adapter; its parameters may be on
    the meta device until `setup_strategy`."""

    files: ModelFiles
    base: Any

    def attach_adapter(self) -> torch.nn.Module:
        """Returns ``base`` with the adapter on it."""

    def setup_strategy(self, model: torch.nn.Module) -> None:
        """Collective: hands the model to the strategy; afterwards every rank holds the weights that it keeps."""

    def statistics(self) -> dict[str, int]:
        """Returns what `Parts.load` has for this rank."""

    def close(self) -> None:
        """Closes the files."""


def loader_of(
    recipe: Recipe, world: World, storage: Storage, adapter: Adapter, task: Task, strategy: Strategy
) -> BaseLoader:
    if strategy.loads_sharded(recipe):
        try:
            return ShardedLoader(recipe, world, storage, adapter, task, strategy)
        except NeedsFullLoad as reason:
            if world.is_rank0:
                log.warning("each rank loads all of %s before it keeps its part: %s", recipe.model.path, reason)
    return WholeLoader(recipe, world, adapter, task, strategy)


class WholeLoader:
    """Each rank loads all weights of the base model."""

    def __init__(self, recipe: Recipe, world: World, adapter: Adapter, task: Task, strategy: Strategy) -> None:
        self._recipe, self._adapter, self._strategy = recipe, adapter, strategy
        self._head = _head(recipe, task)
        self.files = fetch_model(recipe.model)
        self._loaded = load_base(
            recipe.model,
            self.files.folder,
            world.device,
            full=adapter.full,
            checkpointing=recipe.training.gradient_checkpointing,
            head=self._head,
        )
        self.base: Any = self._loaded.model

    def attach_adapter(self) -> torch.nn.Module:
        return self._adapter.attach(self.base, self._unquantised_base)

    def setup_strategy(self, model: torch.nn.Module) -> None:
        self._strategy.setup(model, partial(make_optimizer, self._recipe.optimizer, lr_scale=self._adapter.lr_scale))

    def statistics(self) -> dict[str, int]:
        read = self._loaded.bytes_read
        fetched = self.files.fetched_bytes if "://" in self._recipe.model.path else read
        return {"bytes_read": read, "bytes_fetched": fetched, "peak_host_bytes": self._loaded.peak_host_bytes}

    def close(self) -> None:
        pass

    def _unquantised_base(self) -> torch.nn.Module:
        """Loads the base model a second time, on the CPU, as it is in its files."""
        section = self._recipe.model.model_copy(update={"quantization": "none"})
        cpu = torch.device("cpu")
        return load_base(section, self.files.folder, cpu, full=False, checkpointing=False, head=self._head).model


class ShardedLoader:
    """Each rank reads only the weights that it keeps. Only the constructor raises NeedsFullLoad, before it has changed
    the adapter or the strategy; the constructor is a collective."""

    def __init__(
        self, recipe: Recipe, world: World, storage: Storage, adapter: Adapter, task: Task, strategy: Strategy
    ) -> None:
        self._recipe, self._world, self._adapter, self._task = recipe, world, adapter, task
        self._strategy, self._peak_bytes = strategy, 0
        self._section = section = self._quantised_copy(storage.child(layout.MODELS))
        remote = "://" in section.path
        self.files = fetch_model(section, weights=not remote)
        head = _head(recipe, task)
        self.base: Any = meta_model(
            section,
            self.files.folder,
            world.device,
            full=adapter.full,
            checkpointing=recipe.training.gradient_checkpointing,
            head=head,
        )
        from_base = not adapter.loads_by_shard(self.base)
        check_by_shard(self.base, recipe.model.quantization, recipe.adapter.label, from_base=from_base)
        self._source = WeightSource(section.path if remote else str(self.files.folder))
        try:
            self._weights = ShardLoader(self.base, self._source, section.path, world.device, head)
            if len(set(world.all_gather(self._weights.digest()))) > 1:
                raise InputError(
                    f"model.path {recipe.model.path!r} is not the same model on all hosts; copy it again, or name one "
                    "place that all of them read"
                )
        except BaseException:
            self._source.close()
            raise

    def attach_adapter(self) -> torch.nn.Module:
        model = self._adapter.attach_without_weights(self.base)
        move_buffers(model, self._world.device)
        return model

    def setup_strategy(self, model: torch.nn.Module) -> None:
        strategy, host = self._strategy, HostPeak()
        self._weights.attached(model)
        strategy.setup(
            model,
            partial(make_optimizer, self._recipe.optimizer, lr_scale=self._adapter.lr_scale),
            lambda pieces: self._weights.fill(pieces, self._init_parameter, strategy.full_parameter),
        )
        self._peak_bytes = host.bytes()

    def statistics(self) -> dict[str, int]:
        read, fetched = self._source.bytes_read, self._source.bytes_fetched
        return {"bytes_read": read, "bytes_fetched": fetched, "peak_host_bytes": self._peak_bytes}

    def close(self) -> None:
        self._source.close()

    def _quantised_copy(self, models: Storage) -> ModelSection:
        """Returns the section of the model's NF4 copy if `muster prepare --model` has made one, else the recipe's."""
        section = self._recipe.model
        if section.quantization != "nf4":
            return section
        copy = self._world.decide_on_rank0(lambda: copy_of(section, models))
        return section.model_copy(update={"path": copy.url, "revision": "main"}) if copy else section

    def _init_parameter(self, name: str, shape: torch.Size, start: int, stop: int, rows: RowReader) -> torch.Tensor:
        if self._task.owns_parameter(name):
            return self._task.init_parameter(name, shape).reshape(-1)[start:stop]
        return self._adapter.init_parameter(name, shape, start, stop, rows)


def _head(recipe: Recipe, task: Task) -> Head | None:
    return Head(task.labels, recipe.seed) if task.labels else None


def _tokenizer(recipe: Recipe, folder: Path, chat_template: str | None) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(folder, trust_remote_code=recipe.model.trust_remote_code)
    tokenizer.chat_template = chat_template or tokenizer.chat_template
    return tokenizer
