"""Builds the parts of several runs on one base model.

Each run gets a model of its own without weights (on torch's meta device), on which peft builds its adapter as it does
for a run alone: the same names, the same initial values. The LoRA layers of all runs then join the shared base model.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from trainer.adapters import Adapter, make_adapter
from trainer.adapters.coverage import coverage_of
from trainer.adapters.peft_targets import attached_targets
from trainer.distributed.world import World
from trainer.errors import InputError
from trainer.layers import change_layers
from trainer.model.kernels.liger import use_liger
from trainer.model.meta import meta_model
from trainer.optim import make_optimizer
from trainer.recipe import Recipe
from trainer.storage import Storage
from trainer.tasks import Task, make_task
from trainer.worker.build import Parts, as_told, loader_of, settle_model
from trainer.worker.mfu import meter_of, operations_of
from trainer.worker.start.unused import UnusedTargets, check_used
from trainer.worker.together.shared_base import SharedBase
from trainer.worker.together.strategies import HostDDP, HostFSDP, OfRun, make_host, strategy_of_run
from trainer.worker.together.turns import Turns

if TYPE_CHECKING:
    from trainer.adapters.base import Rows

log = logging.getLogger(__name__)


class RunSpec(NamedTuple):
    """A run to build. ``chat_template``: the run's own, None for the tokenizer's."""

    recipe: Recipe
    chat_template: str | None


class Together(NamedTuple):
    """Runs on one base model. ``turns`` are those of their loops."""

    parts: list[Parts]
    turns: Turns[Any]


def build_together(
    specs: Sequence[RunSpec], world: World, storage: Storage, apart: Any = lambda error: False
) -> Together:
    """Collective: every rank of the attempt calls it, with recipes that differ only in what `Recipe.check_together`
    allows."""
    try:
        return _build(specs, world, storage, apart, frozenset())
    except UnusedTargets as unused:
        left_out = frozenset(unused.names)
    if world.is_rank0:
        log.warning("%d layers get no adapter, since the loss does not depend on them", len(left_out))
    gc.collect()  # the model that was built first
    return _build(specs, world, storage, apart, left_out)


def _build(specs: Sequence[RunSpec], world: World, storage: Storage, apart: Any, left_out: frozenset[str]) -> Together:
    first = specs[0].recipe
    host = make_host(first, world)
    adapters = AdaptersOfRuns([spec.recipe for spec in specs], left_out)
    with closing(loader_of(first, world, storage, adapters, adapters.tasks[0], host)) as loader:
        if first.compute.kernels == "liger":
            use_liger(loader.base)
        check_no_dropout(loader.base)
        base = SharedBase(loader.base, world.device, recomputes=first.training.gradient_checkpointing)
        turns: Turns[Any] = Turns(base.answer, apart)
        built = [
            _build_run(n, spec, world, host, base, turns, adapters, loader.files.folder) for n, spec in enumerate(specs)
        ]
        adapters.joined(base.model)
        change_layers(base.model, first.compute, world.device)
        loader.setup_strategy(base.model)
        base.module, base.synchronise = host.module, host.synchronise
        adapters.fill(world.device)
        for run in built:
            lr_scale = run.adapter.lr_scale
            run.strategy.setup(run.model, partial(make_optimizer, run.recipe.optimizer, lr_scale=lr_scale))
        attention = settle_model(first, world, built[0].strategy, built[0].task, base.model, None)
        for run in built:
            with as_told(first, base.model):
                check_used(run.recipe, world, run.adapter, run.task, run.strategy)
        load = world.all_gather({"rank": world.rank, **loader.statistics()})
        parts = [
            Parts(
                run.recipe,
                world,
                loader.files,
                run.adapter,
                run.task,
                run.strategy,
                meter_of(run.recipe, world, run.operations),
                attention,
                run.coverage,
                load,
                spec.chat_template,
            )
            for run, spec in zip(built, specs, strict=True)
        ]
    return Together(parts, turns)


class _BuiltRun(NamedTuple):
    recipe: Recipe
    adapter: Adapter
    task: Task
    strategy: OfRun
    model: Any
    coverage: Any
    operations: Any


def _build_run(
    number: int,
    spec: RunSpec,
    world: World,
    host: HostFSDP | HostDDP,
    base: SharedBase,
    turns: Turns[Any],
    adapters: AdaptersOfRuns,
    folder: Path,
) -> _BuiltRun:
    """Builds a run's model without weights, and joins its LoRA layers to the base model."""
    recipe, adapter, task = spec.recipe, adapters.of_runs[number], adapters.tasks[number]
    checkpointing = recipe.training.gradient_checkpointing
    shell: Any = meta_model(recipe.model, folder, torch.device("cpu"), full=False, checkpointing=checkpointing)
    shell.config = base.model.config  # the attention kernel is chosen once
    model: Any = adapter.attach_without_weights(shell)
    coverage, operations = coverage_of(model), operations_of(model)
    layers = {target: model.get_submodule(name) for name, target in attached_targets(model).items()}
    if any(layer is model.get_output_embeddings() for layer in layers.values()):
        raise InputError("adapter.target_modules includes the output head, which runs together share: leave it out")
    model.set_output_embeddings(base.head_for_run())
    task.world = world
    task.attach(model, None)
    for target, layer in layers.items():
        base.adapt(target, number, layer)
    strategy = strategy_of_run(recipe, world, host, base, turns, number)
    strategy.layers, strategy.head = layers, task.head
    adapters.models.append(model)
    return _BuiltRun(recipe, adapter, task, strategy, model, coverage, operations)


class AdaptersOfRuns(Adapter):
    """The adapters of all runs, as a loader of the base model sees them. ``models``: of the runs, once they are
    built."""

    def __init__(self, recipes: Sequence[Recipe], left_out: frozenset[str]) -> None:
        super().__init__(recipes[0])
        self.of_runs, self.tasks = [make_adapter(recipe) for recipe in recipes], [make_task(r) for r in recipes]
        for adapter in self.of_runs:
            adapter.left_out = left_out
        self.models: list[Any] = []
        self._own_names: dict[str, tuple[int, str]] = {}

    def loads_by_shard(self, base: torch.nn.Module) -> bool:
        return all(adapter.loads_by_shard(base) for adapter in self.of_runs)

    def joined(self, base: torch.nn.Module) -> None:
        """Notes which parameters of ``base`` are whose."""
        own = {
            id(p): (n, name)
            for n, model in enumerate(self.models)
            for name, p in model.named_parameters()
            if p.requires_grad
        }
        self._own_names = {name: own[id(p)] for name, p in base.named_parameters() if id(p) in own}
        assert len(self._own_names) == len(own), "each trained parameter is in the base model"

    def init_parameter(self, name: str, shape: torch.Size, start: int, stop: int, rows: Rows) -> torch.Tensor:
        number, own = self._own_names[name]
        return self.of_runs[number].init_parameter(own, shape, start, stop, rows)

    def fill(self, device: torch.device) -> None:
        """Gives the trained parameters that are still on the meta device their initial values."""
        for adapter, model in zip(self.of_runs, self.models, strict=True):
            for name, parameter in list(model.named_parameters()):
                if not (parameter.requires_grad and parameter.is_meta):
                    continue
                shape = parameter.shape
                values = adapter.init_parameter(name, shape, 0, shape.numel(), _no_rows).view(shape)
                module, _, attribute = name.rpartition(".")
                model.get_submodule(module)._parameters[attribute] = torch.nn.Parameter(values.to(device))

    def attach(self, base: torch.nn.Module, plain: Any = None) -> torch.nn.Module:
        raise NotImplementedError("each run's adapter is attached to a model of its own")

    def saved_names(self, model: torch.nn.Module) -> dict[str, str]:
        raise NotImplementedError("each run saves its own adapter")

    def save(self, model: torch.nn.Module, weights: Any, folder: Path) -> None:
        raise NotImplementedError("each run saves its own adapter")


def _no_rows(name: str, first: int, last: int) -> Any:
    raise NotImplementedError(f"the initial values of plain LoRA do not depend on the base model ({name})")


def check_no_dropout(base: Any) -> None:
    """Raises InputError for a base model that drops elements in training: its random numbers would be drawn for the
    rows of all runs at once, and no run would have those that it has alone."""
    config = base.config.get_text_config()
    dropped = [name for name, m in base.named_modules() if isinstance(m, torch.nn.Dropout) and m.p > 0]
    names = [n for n, value in vars(config).items() if "dropout" in n and isinstance(value, float) and value > 0]
    if dropped or names:
        raise InputError(
            f"{type(base).__name__} has dropout of its own ({', '.join([*names, *dropped][:3])}), whose random numbers "
            "runs together would share: train the runs apart"
        )
