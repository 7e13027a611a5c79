"""The initial values of the trained weights, if they are those of a trained adapter (`adapter.from`)."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from trainer.adapters.peft_method import PeftMethod
from trainer.artifacts.adapter_files import read_adapter_config
from trainer.artifacts.start import (
    Start,
    check_round_trip,
    check_settings,
    check_tensors,
    fetch_again,
    fetch_start,
    shapes_in,
)
from trainer.errors import CorruptObject, InputError
from trainer.run.events import StartEvent
from trainer.storage import open_storage
from trainer.worker.build import Parts
from trainer.worker.checkpointer import fetched_once_per_host
from trainer.worker.recorder import Recorder

log = logging.getLogger(__name__)


def begin_from(parts: Parts, uri: str, before: Mapping[str, Any] | None = None) -> Start:
    """Collective: puts the weights of a trained adapter into the model that was built. Any state of training that is
    restored afterwards replaces them. ``before``: see `fetch_start`; rank 0's counts.

    Raises InputError if the adapter does not fit."""
    world, section = parts.world, parts.recipe.model
    with tempfile.TemporaryDirectory(prefix="muster-start-") as folder:
        target = Path(folder, "adapter")
        found = world.decide_on_rank0(lambda: fetch_start(uri, target, section, before=before))
        with fetched_once_per_host(world, target, lambda: fetch_again(found, target)) as files:
            _load(parts, uri, files)
    return found


def begun_before(recorder: Recorder, uri: str) -> Mapping[str, Any] | None:
    """Returns what the newest attempt before has begun from, if it was this address. Rank 0 only."""
    found = [event.begins_from for event in recorder.earlier_events() if isinstance(event, StartEvent)]
    return next((start for start in reversed(found) if start and start.get("uri") == uri), None)


def _load(parts: Parts, uri: str, folder: Path) -> None:
    from safetensors import safe_open

    adapter, strategy = parts.adapter, parts.strategy
    model: Any = strategy.model
    assert isinstance(adapter, PeftMethod), "the recipe refuses adapter.from without an adapter"
    check_round_trip(uri, adapter)
    check_settings(uri, read_adapter_config(folder, uri), adapter.saved_config(model))
    check_tensors(uri, shapes_in(open_storage(str(folder)), uri), adapter.saved_shapes(model, strategy.shape_of))
    with safe_open(folder / adapter.weights_file, framework="pt") as file:

        def read(name: str) -> torch.Tensor:
            tensor: torch.Tensor = file.get_tensor(name)
            if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
                raise InputError(f"adapter.from {uri}: {name} holds values that are not finite numbers")
            return tensor

        strategy.load_weights(lambda name: adapter.read_parameter(model, name, read))
        try:
            adapter.after_restore(model, read)
        except CorruptObject as error:
            raise InputError(f"adapter.from {uri} has other frozen tensors than this run: {error}") from error
