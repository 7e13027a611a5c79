"""What a checkpoint holds, and the one way in and out of it.

    adapter_config.json, adapter_model.safetensors      what was trained, as plain peft reads it
    (full fine-tuning: config.json, model.safetensors)
    optimizer.safetensors                               optimizer state, whole tensors by parameter name
    master.safetensors                                  float32 weights, where the saved ones are narrower or in
                                                        another form
    method.safetensors                                  what the method keeps from step to step, where it does
    tokenizer files, README.md, muster.json             with the last checkpoint of a run

Everything else that training goes on from (step, data cursor, loss scale) is JSON in the commit record. Random state
needs no place: it is seeded per (seed, step, micro-batch).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from trainer.adapters import Adapter, verify_saved
from trainer.publish import MASTER_FILE, METHOD_FILE, OPTIMIZER_FILE
from trainer.strategies import Strategy


@dataclass(frozen=True)
class Snapshot:
    """A copy on the host of everything that step ``step`` left behind; nothing in it changes while it is uploaded."""

    step: int
    weights: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, torch.Tensor]
    state: Mapping[str, Any]
    final: bool
    method: Mapping[str, torch.Tensor] = field(default_factory=dict)


class TrainState:
    """Moves the state of a strategy's model and optimizer to and from the files of a checkpoint."""

    def __init__(self, strategy: Strategy, adapter: Adapter) -> None:
        self.strategy = strategy
        self.adapter = adapter
        # Taken from the model once, not from what is gathered: a gather that lost something is to be found out.
        self._shapes = adapter.saved_shapes(strategy.model, strategy.shape_of)

    @property
    def needed(self) -> tuple[str, ...]:
        """The files without which a checkpoint is none."""
        return (self.adapter.weights_file, OPTIMIZER_FILE)

    def snapshot(self, step: int, state: Mapping[str, Any], *, final: bool) -> Snapshot | None:
        """Collective. The snapshot on rank 0, None on the others; nobody waits for storage."""
        keep = self.strategy.world.is_first
        weights = _copies(self.strategy.weights(), keep)
        optimizer = _copies(self.strategy.optimizer_state(), keep)
        scaler = self.strategy.scaler.state_dict()
        method = _copies(self.adapter.state(self.strategy.model).items(), keep)
        return Snapshot(step, weights, optimizer, {**state, "scaler": scaler}, final, method) if keep else None

    def write(self, snapshot: Snapshot, folder: Path) -> None:
        """Writes the snapshot's files and reopens what was trained; CorruptObject when it is not what it should be."""
        from safetensors.torch import save_file

        self.adapter.save(self.strategy.model, snapshot.weights, folder)
        save_file(dict(snapshot.optimizer), folder / OPTIMIZER_FILE)
        if self._has_master(snapshot.weights):
            save_file(dict(snapshot.weights), folder / MASTER_FILE)
        if snapshot.method:
            save_file(dict(snapshot.method), folder / METHOD_FILE)
        verify_saved(self.adapter, self._shapes, folder, updated=bool(snapshot.optimizer))

    def _has_master(self, weights: Mapping[str, torch.Tensor]) -> bool:
        dtype = getattr(torch, self.adapter.recipe.model.dtype)
        narrower = self.adapter.full and any(t.dtype != dtype for t in weights.values())
        return narrower or not self.adapter.reads_back

    def load(self, folder: Path, state: Mapping[str, Any]) -> None:
        """Collective: every rank has the same verified files in ``folder``, written under any strategy."""
        from safetensors import safe_open

        with ExitStack() as stack:
            opened: dict[str, Any] = {}

            def reader(name: str) -> Any:
                if name not in opened:
                    opened[name] = stack.enter_context(safe_open(folder / name, framework="pt"))
                return opened[name]

            self.strategy.load_weights(self._weight_reader(folder, reader))
            moments = reader(OPTIMIZER_FILE)
            keys: dict[str, list[str]] = defaultdict(list)
            for saved in moments.keys():  # noqa: SIM118 - a safetensors file is no mapping
                parameter, key = saved.rsplit(".", 1)
                keys[parameter].append(key)
            self.strategy.load_optimizer_state(keys, moments.get_tensor)
            self._load_method(folder, reader)
        if state.get("scaler"):
            self.strategy.scaler.load_state_dict(state["scaler"])

    def _weight_reader(self, folder: Path, reader: Callable[[str], Any]) -> Callable[[str], torch.Tensor]:
        if (folder / MASTER_FILE).exists():
            tensor: Callable[[str], torch.Tensor] = reader(MASTER_FILE).get_tensor
            return tensor
        read = reader(self.adapter.weights_file).get_tensor
        return lambda name: self.adapter.trained(self.strategy.model, name, read)

    def _load_method(self, folder: Path, reader: Callable[[str], Any]) -> None:
        model, adapter = self.strategy.model, self.adapter
        adapter.restored(model, reader(adapter.weights_file).get_tensor)
        kept = reader(METHOD_FILE) if (folder / METHOD_FILE).exists() else None
        adapter.load_state(model, {n: kept.get_tensor(n) for n in kept.keys()} if kept else {})  # noqa: SIM118


def _copies(tensors: Any, keep: bool) -> dict[str, torch.Tensor]:
    """Iterates to the end on every rank (the iterator gathers); copies where they are kept, since a tensor that was on
    the CPU all along is the one that training goes on changing. safetensors takes contiguous ones only."""
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors if keep}
