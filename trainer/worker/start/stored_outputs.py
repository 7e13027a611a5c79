"""Computes what a task needs of a frozen model (`Task.outputs`), once for all samples of the run's data, before the
first step, and stores it next to the prepared data. Every attempt looks first whether that is done."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch

from trainer.data import Batch, MicroBatch, PreparedDataset, SampleRef
from trainer.data.loading.block_reader import BlockReader
from trainer.data.loading.collate import read_batch
from trainer.data.loading.next_use import NextUse, Use
from trainer.data.outputs import (
    PART_BYTES,
    Outputs,
    Part,
    StoredOutputs,
    complete,
    encode_outputs,
    folder_of,
    missing_parts,
    open_outputs,
    part_key,
    part_numbers,
)
from trainer.data.run_data import RunData
from trainer.distributed.world import World
from trainer.errors import InputError
from trainer.model.files.identity import identity_of
from trainer.recipe import Recipe
from trainer.storage import Storage
from trainer.strategies import Strategy
from trainer.tasks import Task
from trainer.worker.build import Parts
from trainer.worker.start.initial_weights import begin_from

log = logging.getLogger(__name__)

LINES = 50
"""Lines of the log, about, while outputs are computed."""


@dataclass(frozen=True)
class Ranks:
    """How the micro-batches of a part are spread: number k goes to data-parallel rank k % ``count``. ``counts``: this
    process reports its micro-batches; of those that compute parts of the same tokens, one does."""

    world: World | None = None
    rank: int = 0
    count: int = 1
    counts: bool = True

    @classmethod
    def of(cls, strategy: Strategy) -> Ranks:
        world, mesh = strategy.world, strategy.mesh
        return cls(world, mesh.data_rank(world.rank), mesh.data_ranks, mesh.context_rank(world.rank) == 0)

    def gathered(self, mine: Mapping[int, list[Outputs]]) -> list[Outputs]:
        """Returns the outputs of all samples, in order. Collective."""
        parts = self.world.all_gather(mine if self.counts else {}) if self.world else [mine]
        of_batches = {k: samples for part in parts for k, samples in part.items()}
        return [sample for k in sorted(of_batches) for sample in of_batches[k]]

    def decide(self, look: Callable[[], Any]) -> Any:
        return self.world.decide_on_rank0(look) if self.world else look()


def settings_of(recipe: Recipe, task: Task, begins_from: str | None) -> dict[str, Any] | None:
    """Returns everything that decides the outputs; None if the task stores none. ``begins_from``: the sha256 of the
    adapter that training begins with."""
    settings = task.output_settings()
    if settings is None or not task.outputs_from_model:
        return settings and {"task": recipe.task, **settings}
    model = {
        "identity": identity_of(recipe.model),
        "quantization": recipe.model.quantization,
        "dtype": recipe.model.dtype,
    }
    return {"task": recipe.task, **settings, "model": model, **({"adapter": begins_from} if begins_from else {})}


def with_outputs(
    parts: Parts, data: RunData, begins_from: Mapping[str, Any] | None = None, *, is_initial: bool = True
) -> RunData:
    """Returns the run's data with the outputs that its task needs. Collective: nothing has been restored yet, and every
    rank calls it. ``begins_from``: the adapter that training begins with (`trainer.worker.start.initial_weights`);
    ``is_initial``: its weights are in the model already."""
    recipe, strategy, world = parts.recipe, parts.strategy, parts.world
    sha256 = begins_from["sha256"] if begins_from else None
    settings = world.decide_on_rank0(lambda: settings_of(recipe, parts.task, sha256))
    if settings is None:
        return data
    folders = [folder_of(part.storage, settings) for part in (data.train, data.eval) if part]
    missing = world.decide_on_rank0(lambda: None in map(open_outputs, folders))
    if missing and begins_from and not is_initial and parts.task.outputs_from_model:
        _begin_again(parts, begins_from)
    module, device, size = strategy.module, parts.world.device, recipe.training.micro_batch
    maker = OutputsMaker(parts.task, module, device, size, Ranks.of(strategy), strategy.autocast, strategy.reshard)
    module.eval()
    train = maker.with_outputs(data.train, settings, "training data")
    evaluation = data.eval and maker.with_outputs(data.eval, settings, "evaluation data")
    module.train()
    parts.task.outputs_are_stored()
    return replace(data, train=train, eval=evaluation)


def _begin_again(parts: Parts, begun: Mapping[str, Any]) -> None:
    """Loads the adapter that the run has begun with. Raises InputError if it is not the same any more."""
    if begin_from(parts, begun["uri"], begun).sha256 != begun["sha256"]:
        raise InputError(
            f"adapter.from {begun['uri']} has changed since this run began, and the outputs of its weights for the "
            "data are not stored any more; put the adapter back, or start a run under another name"
        )


@dataclass(frozen=True)
class OutputsMaker:
    """``forward``: the context of a forward pass. ``after_part``: called after the forwards of a part."""

    task: Task
    module: torch.nn.Module
    device: torch.device
    micro_batch: int
    ranks: Ranks
    forward: Callable[[], AbstractContextManager[Any]]
    after_part: Callable[[], None]

    def with_outputs(
        self, prepared: PreparedDataset, settings: Mapping[str, Any], name: str, storage: Storage | None = None
    ) -> PreparedDataset:
        """Returns the data with their outputs, which it computes and stores unless they are there: next to the prepared
        data, or in a ``storage`` of their own. Collective."""
        folder = folder_of(storage or prepared.storage, settings)
        stored: StoredOutputs | None = self.ranks.decide(lambda: open_outputs(folder))
        if stored is None:
            size = self.task.bytes_of_target()
            limit = max(1, PART_BYTES // size) if size else None
            parts = _parts(prepared, limit)
            missing = self.ranks.decide(lambda: missing_parts(folder, parts))
            reader = BlockReader(replace(prepared, outputs=None), NextUse(lambda _: range(prepared.count)))
            for number, part in enumerate(missing, 1):
                self._store(folder, reader, part, limit)
                if number % max(1, len(missing) // LINES) == 0:
                    log.info("%s: outputs computed before training: part %d of %d", name, number, len(missing))
            self.ranks.decide(lambda: complete(folder, settings, parts, limit))
            stored = self.ranks.decide(lambda: open_outputs(folder))
        return replace(prepared, outputs=stored)

    @torch.no_grad()
    def _store(self, folder: Storage, reader: BlockReader, part: Part, limit: int | None) -> None:
        reader.upcoming.move(Use(0, part.window, 0))
        mine: dict[int, list[Outputs]] = {}
        for k, batch in self._batches(reader, part, limit):
            with self.forward():
                found = self.task.outputs(self.module, batch, self.device)
            if batch.samples:
                mine[k] = [{name: values[i] for name, values in found.items()} for i in range(batch.samples)]
        self.after_part()
        outputs = self.ranks.gathered(mine)
        self.ranks.decide(lambda: folder.put_if_absent(part_key(part), encode_outputs(outputs)))

    def _batches(self, reader: BlockReader, part: Part, limit: int | None) -> Iterator[tuple[int, Batch]]:
        """Yields this rank's micro-batches of a part, each sample by itself; every rank gets as many."""
        index = reader.prepared.index(part.window)
        samples = (index.block == part.block).nonzero()[0]
        samples = samples[part_numbers(index.targets[samples], limit) == part.number]
        refs = iter([SampleRef(part.window, int(sample)) for sample in samples])
        parts = list(iter(lambda: list(islice(refs, self.micro_batch)), []))
        for k in range(self.ranks.rank, -(-len(parts) // self.ranks.count) * self.ranks.count, self.ranks.count):
            of_k = MicroBatch(k, tuple((ref,) for ref in parts[k]), 0, 0) if k < len(parts) else None
            yield k, read_batch(reader, of_k) if of_k else Batch.empty()


def _parts(prepared: PreparedDataset, limit: int | None) -> list[Part]:
    """Returns all parts. Reads all indexes."""
    found = []
    for window, block in prepared.blocks():
        index = prepared.index(window)
        numbers = np.unique(part_numbers(index.targets[index.block == block], limit))
        found += [Part(window, block, int(number)) for number in numbers]
    return found
