"""What a rank trains with: the base, the adapter on it, the task, and the strategy that spreads it over the ranks.

There are two ways. By shard, no rank ever holds more of the base than it keeps; the strategies that shard parameters go
this way wherever the adapter, the task and the architecture can. Otherwise each rank loads the base whole.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trainer.adapters import Adapter, make_adapter
from trainer.distributed.world import World
from trainer.errors import InputError
from trainer.model import Head, LoadedModel, ModelFiles, build, check_isolation, fetch_model, load_tokenizer
from trainer.model.files.weight_source import WeightSource
from trainer.model.kernels.attention import settle_attention
from trainer.model.kernels.liger import use_liger
from trainer.model.meta import NeedsFullLoad, meta_model
from trainer.model.peak_rss import HostPeak
from trainer.model.prequantised import copy_of
from trainer.model.sharded_load import RowReader, ShardLoader
from trainer.optim import make_optimizer
from trainer.recipe import ModelSection, Recipe
from trainer.run import layout
from trainer.storage import open_storage
from trainer.strategies import Strategy, make_strategy
from trainer.strategies.compiling import compile_layers
from trainer.tasks import GenerationContext, Task, make_task
from trainer.worker.metering import operations_of
from trainer.worker.mfu import Operations

log = logging.getLogger(__name__)

Accompany = Callable[[Path], None]


@dataclass(frozen=True)
class Built:
    """``operations``: what a step computes with the model as it is trained. ``attention``: the kernel of attention.
    ``load``: of each rank, the bytes of the base that it read, those of them that no cache of the host had, and the
    peak of its host memory meanwhile."""

    files: ModelFiles
    adapter: Adapter
    task: Task
    strategy: Strategy
    operations: Operations
    attention: str
    load: list[dict[str, int]]


def build_parts(recipe: Recipe, world: World, labels: tuple[str, ...] = (), reward: Any = None) -> Built:
    """Collective: every rank of the attempt calls it. ``labels``: the label set of the training data. ``reward``: the
    model that rates the task's texts, if there is one."""
    adapter, task, strategy = make_adapter(recipe), make_task(recipe, labels), make_strategy(recipe, world)
    company = partial(accompany, task, recipe, world=world, strategy=strategy, reward=reward)
    if strategy.loads_sharded(recipe):
        try:
            return _Sharded(recipe, world, adapter, task, strategy, company).build()
        except NeedsFullLoad as reason:
            if world.is_rank0:
                log.warning("each rank loads %s whole before it keeps its part: %s", recipe.model.path, reason)
    return _whole(recipe, world, adapter, task, strategy, company)


def _whole(
    recipe: Recipe,
    world: World,
    adapter: Adapter,
    task: Task,
    strategy: Strategy,
    company: Accompany = lambda folder: None,
) -> Built:
    files = fetch_model(recipe.model)
    head = _head(recipe, task)
    loaded: LoadedModel = build(
        recipe.model,
        files.folder,
        world.device,
        full=adapter.full,
        checkpointing=recipe.training.gradient_checkpointing,
        head=head,
    )
    if recipe.compute.kernels == "liger":
        use_liger(loaded.model)
    if recipe.data.packing:
        check_isolation(loaded.model, recipe.model.path)
    model = adapter.attach(loaded.model, lambda: _plain_model(recipe, files, head))
    company(files.folder)
    task.attach(model)
    operations = operations_of(model)
    if recipe.compute.compile:
        compile_layers(model, world.device)
    strategy.setup(model, lambda parameters: make_optimizer(recipe.optimizer, parameters, adapter.lr_scale))
    attention = _settle_attention(recipe, strategy, world)
    fetched = files.fetched_bytes if "://" in recipe.model.path else loaded.bytes_read
    report = _report(world, loaded.bytes_read, fetched, loaded.peak_host_bytes)
    return Built(files, adapter, task, strategy, operations, attention, report)


def _settle_attention(recipe: Recipe, strategy: Strategy, world: World) -> str:
    with strategy.autocast():
        kernel = settle_attention(recipe, strategy.model, strategy.module, world.device)
    strategy.reshard()
    return kernel


def accompany(
    task: Task, recipe: Recipe, folder: Path, *, world: World, strategy: Strategy, reward: Any = None
) -> None:
    """Gives a task that writes texts what it needs for it. ``folder``: the base's files."""
    if task.generates:
        tokenizer = load_tokenizer(folder, trust_remote_code=recipe.model.trust_remote_code)
        task.generation = GenerationContext(tokenizer, world, strategy.forward_is_collective, reward)


def _head(recipe: Recipe, task: Task) -> Head | None:
    return Head(task.labels, recipe.seed) if task.labels else None


def _plain_model(recipe: Recipe, files: ModelFiles, head: Head | None) -> torch.nn.Module:
    """The base once more, as it lies in its files, on the CPU."""
    section = recipe.model.model_copy(update={"quantization": "none"})
    return build(section, files.folder, torch.device("cpu"), full=False, checkpointing=False, head=head).model


class _Sharded:
    """The base by shard. All that can raise NeedsFullLoad comes before the adapter and the strategy touch anything."""

    def __init__(
        self, recipe: Recipe, world: World, adapter: Adapter, task: Task, strategy: Strategy, company: Accompany
    ) -> None:
        self.recipe, self.world, self.company = recipe, world, company
        self.adapter, self.task, self.strategy = adapter, task, strategy

    def build(self) -> Built:
        if self.recipe.model.quantization == "int8":
            raise NeedsFullLoad("bitsandbytes quantises whole weights to int8")
        recipe, section = self.recipe, self._section()
        remote = "://" in section.path
        files = fetch_model(section, weights=not remote)
        head = _head(recipe, self.task)
        base = meta_model(
            section,
            files.folder,
            self.world.device,
            full=self.adapter.full,
            checkpointing=recipe.training.gradient_checkpointing,
            head=head,
        )
        if recipe.compute.kernels == "liger":
            use_liger(base)
        if not self.adapter.loads_by_shard(base):
            raise NeedsFullLoad(f"{recipe.adapter.method} is made from the whole of the base's weights")
        source = WeightSource(section.path if remote else str(files.folder))
        try:
            loader = ShardLoader(base, source, section.path, self.world.device, head)
            self._check_same(loader.digest())
            self.company(files.folder)
            peak = self._load(base, loader)
        finally:
            source.close()
        if recipe.data.packing:
            with self.strategy.autocast():
                check_isolation(self.strategy.module, section.path)
            self.strategy.reshard()
        attention = _settle_attention(recipe, self.strategy, self.world)
        report = _report(self.world, source.bytes_read, source.bytes_fetched, peak)
        return Built(files, self.adapter, self.task, self.strategy, self.operations, attention, report)

    def _section(self) -> ModelSection:
        """The model's, or that of its NF4 copy, if `muster prepare --model` has made one."""
        section = self.recipe.model
        if section.quantization != "nf4":
            return section
        models = open_storage(self.recipe.storage).child(layout.MODELS)
        copy = self.world.decide_on_rank0(lambda: copy_of(section, models))
        return section.model_copy(update={"path": copy.url, "revision": "main"}) if copy else section

    def _load(self, base: Any, loader: ShardLoader) -> int:
        """Returns the peak of host memory over what the process held before."""
        model = self.adapter.attach_without_weights(base)
        _move_buffers(model, self.world.device)
        self.task.attach(model)
        self.operations = operations_of(model)
        if self.recipe.compute.compile:
            compile_layers(model, self.world.device)
        host = HostPeak()
        loader.attached(model)
        strategy = self.strategy
        strategy.setup(
            model,
            lambda parameters: make_optimizer(self.recipe.optimizer, parameters, self.adapter.lr_scale),
            lambda pieces: loader.fill(pieces, self._initial, strategy.full_parameter),
        )
        return host.bytes()

    def _initial(self, name: str, shape: torch.Size, start: int, stop: int, rows: RowReader) -> torch.Tensor:
        if self.task.owns_parameter(name):
            return self.task.init_parameter(name, shape).reshape(-1)[start:stop]
        return self.adapter.init_parameter(name, shape, start, stop, rows)

    def _check_same(self, digest: str) -> None:
        if len(set(self.world.all_gather(digest))) > 1:
            raise InputError(
                f"model.path {self.recipe.model.path!r} is not the same model on all hosts; copy it again, or name one "
                "place that all of them read"
            )


def _move_buffers(model: torch.nn.Module, device: torch.device) -> None:
    """Those that the adapter has brought."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)


def _report(world: World, read: int, fetched: int, peak: int) -> list[dict[str, int]]:
    mine = {"rank": world.rank, "bytes_read": read, "bytes_fetched": fetched, "peak_host_bytes": peak}
    return world.all_gather(mine)
