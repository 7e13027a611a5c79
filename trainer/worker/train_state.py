"""The contents of a checkpoint, and how they are written and read.

    adapter_config.json, adapter_model.safetensors      the trained weights, as plain peft reads them
    (full fine-tuning: config.json, model.safetensors)
    optimizer.safetensors                               optimizer state, full tensors by parameter name
    master.safetensors                                  float32 weights, if the saved ones are narrower, in another
                                                        form, or averages of those that training continues with
    method.safetensors                                  the method's state between steps, if it has one
    value_head.safetensors                              the module that the task trains, if it has one
    tokenizer files, README.md, muster.json             with the last checkpoint of a run

Everything else that training resumes from (step, data cursor, loss scale, the task's state) is JSON in the commit
record. Random state is not stored: it is seeded per (seed, step, micro-batch).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import torch

from trainer.adapters import Adapter, verify_saved
from trainer.checkpoint.publish import MASTER_FILE, METHOD_FILE, OPTIMIZER_FILE
from trainer.errors import CorruptObject
from trainer.parsing import Malformed
from trainer.records import Count, read_record
from trainer.run.best import read_best
from trainer.strategies import Strategy
from trainer.tasks import Task


@dataclass(frozen=True)
class Snapshot:
    """A copy of the state after ``step``, in host memory; it does not change while it is uploaded. ``trained``: the
    weights that training continues with, if ``weights`` are their average. ``final``: no step of the attempt follows;
    ``best``: its evaluation is the best so far."""

    step: int
    weights: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, torch.Tensor]
    state: Mapping[str, Any]
    final: bool
    method: Mapping[str, torch.Tensor] = field(default_factory=dict)
    trained: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def best(self) -> bool:
        best = read_best(self.state)
        return best is not None and best.step == self.step


class _Scaler(TypedDict):
    """The state of `torch.amp.GradScaler`."""

    scale: float
    growth_factor: float
    backoff_factor: float
    growth_interval: Count
    _growth_tracker: Count


class TrainState:
    """Moves the state of a strategy's model and optimizer, and of the task, to and from the files of a checkpoint."""

    def __init__(self, strategy: Strategy, adapter: Adapter, task: Task) -> None:
        self.strategy = strategy
        self.adapter = adapter
        self.task = task
        self._beside = ExtraModule(strategy, task.extra_module) if task.extra_module else None
        # From the model and not from gathered tensors, so that a gather that lost something is detected.
        self._shapes = adapter.saved_shapes(strategy.model, strategy.shape_of)

    @property
    def needed(self) -> tuple[str, ...]:
        """The files that every checkpoint must have."""
        return (self.adapter.weights_file, OPTIMIZER_FILE, *([self._beside.file] if self._beside else []))

    def snapshot(self, step: int, state: Mapping[str, Any], *, final: bool) -> Snapshot | None:
        """Collective. Returns the snapshot on rank 0, None on the others. Does not wait for storage."""
        keep = self.strategy.world.is_rank0
        trained = _copies(self.strategy.weights(), keep)
        weights = trained
        if self.strategy.row.averages:
            with self.strategy.averaged():
                weights = _copies(self.strategy.weights(), keep)
        optimizer = _copies(self.strategy.optimizer_state(), keep)
        scaler = self.strategy.scaler.state_dict()
        method = _copies(self.adapter.state(self.strategy.model).items(), keep)
        kept = {**state, "scaler": scaler, "task": self.task.state()}
        apart = trained if trained is not weights else {}
        return Snapshot(step, weights, optimizer, kept, final, method, apart) if keep else None

    def write(self, snapshot: Snapshot, folder: Path) -> None:
        """Writes the snapshot's files, then reads the trained weights back. Raises CorruptObject if they are not as
        they were trained."""
        from safetensors.torch import save_file

        weights = snapshot.weights
        if self._beside:
            weights = self._beside.save(weights, folder)
        self.adapter.save(self.strategy.model, weights, folder)
        save_file(dict(snapshot.optimizer), folder / OPTIMIZER_FILE)
        dtype = getattr(torch, self.adapter.recipe.model.dtype)
        narrower = self.adapter.full and any(tensor.dtype != dtype for tensor in weights.values())
        if snapshot.trained or narrower or not self.adapter.round_trips:
            save_file(dict(snapshot.trained or weights), folder / MASTER_FILE)
        if snapshot.method:
            save_file(dict(snapshot.method), folder / METHOD_FILE)
        verify_saved(self.adapter, self._shapes, folder, updated=bool(snapshot.optimizer))

    def load(self, folder: Path, state: Mapping[str, Any]) -> None:
        """Collective: every rank has the same verified files in ``folder``, written under any strategy."""
        from safetensors import SafetensorError, safe_open

        with ExitStack() as stack:
            opened: dict[str, Any] = {}

            def reader(name: str) -> Any:
                if name not in opened:
                    try:
                        opened[name] = stack.enter_context(safe_open(folder / name, framework="pt"))
                    except SafetensorError as error:
                        raise CorruptObject(f"the checkpoint's {name} is no safetensors file: {error}") from error
                return opened[name]

            moments = reader(OPTIMIZER_FILE)
            keys: dict[str, list[str]] = defaultdict(list)
            for saved in moments.keys():  # noqa: SIM118 - a safetensors file is no mapping
                parameter, key = saved.rsplit(".", 1)
                keys[parameter].append(key)
            self.strategy.load_optimizer_state(keys, moments.get_tensor)
            self.strategy.load_weights(self._weight_reader(folder, reader))
            self.adapter.after_restore(self.strategy.model, reader(self.adapter.weights_file).get_tensor)
            kept = reader(METHOD_FILE) if (folder / METHOD_FILE).exists() else None
            method = {name: kept.get_tensor(name) for name in kept.keys()} if kept else {}  # noqa: SIM118
            self.adapter.load_state(self.strategy.model, method)
        if state.get("scaler"):
            self.strategy.scaler.load_state_dict(state["scaler"])
        self.task.load_state(state.get("task", {}))

    def check(self, state: Mapping[str, Any]) -> None:
        """Raises CorruptObject for a state that `load` cannot use. The task loads its own state here already."""
        try:
            if state.get("scaler"):
                read_record(_Scaler, state["scaler"])
            self.task.load_state(state.get("task", {}))
        except Malformed as error:
            raise CorruptObject(f"the state in the commit record is not complete: {error}") from error

    def _weight_reader(self, folder: Path, reader: Callable[[str], Any]) -> Callable[[str], torch.Tensor]:
        read = reader(self.adapter.weights_file).get_tensor
        others: Callable[[str], torch.Tensor] = partial(self.adapter.read_parameter, self.strategy.model, read=read)
        if self._beside:
            others = self._beside.reading(others, reader)
        if not (folder / MASTER_FILE).exists():
            return others
        master = reader(MASTER_FILE)
        kept = set(master.keys())
        return lambda name: master.get_tensor(name) if name in kept else others(name)


class ExtraModule:
    """The module that a task trains in addition to the adapter. It has a file of its own, so that the adapter's file is
    plain peft."""

    def __init__(self, strategy: Strategy, module: str) -> None:
        self.file = f"{module}.safetensors"
        parameters = {n: p for n, p in strategy.trainable().items() if n.startswith(f"{module}.")}
        self._shapes = {name: strategy.shape_of(p) for name, p in parameters.items()}
        self._prefix = f"{module}."

    def save(self, weights: Mapping[str, torch.Tensor], folder: Path) -> dict[str, torch.Tensor]:
        """Writes the module's tensors and returns the others. Raises CorruptObject for a wrong shape or a value that is
        not finite."""
        from safetensors.torch import save_file

        mine = {name.removeprefix(self._prefix): weights[name] for name in self._shapes}
        for name, shape in self._shapes.items():
            if tuple(weights[name].shape) != shape or not torch.isfinite(weights[name]).all():
                raise CorruptObject(
                    f"{self.file}: {name} has not the shape {shape}, or holds a value that is not finite"
                )
        save_file(mine, folder / self.file, {"format": "pt"})
        return {name: tensor for name, tensor in weights.items() if name not in self._shapes}

    def reading(
        self, others: Callable[[str], torch.Tensor], reader: Callable[[str], Any]
    ) -> Callable[[str], torch.Tensor]:
        def read(name: str) -> torch.Tensor:
            if name not in self._shapes:
                return others(name)
            tensor: torch.Tensor = reader(self.file).get_tensor(name.removeprefix(self._prefix))
            return tensor

        return read


def _copies(tensors: Any, keep: bool) -> dict[str, torch.Tensor]:
    """Collective: the iterator gathers, so every rank must exhaust it. Returns contiguous copies if ``keep`` is set."""
    # A tensor that is on the CPU is training's own and will change; safetensors needs contiguous ones.
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors if keep}
