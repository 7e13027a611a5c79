"""Merge into a base model that is larger than the memory: layer by layer, from file to file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from trainer.adapters.meta_init import COPY, ORIGINAL
from trainer.errors import InputError
from trainer.model.files.sharded_writer import WeightFiles
from trainer.model.files.weight_check import INDEX
from trainer.model.meta import META
from trainer.model.offload import LaidOut, named_tensors, put

FILE_BYTES = 2 * 2**30
BASE = ".base_layer."


def merge_in_parts(laid_out: LaidOut, active: Sequence[str], folder: Path) -> None:
    """Writes the merged model's weights and configuration into ``folder``. Needs memory for the largest layer that has
    an adapter, and for one file of the result.

    Passes on peft's errors for a method that it cannot merge."""
    _check(laid_out)
    files = WeightFiles(lambda name, path: shutil.move(path, folder / name), FILE_BYTES)
    merged: dict[str, torch.Tensor] = {}
    for names, tensor in _in_file_order(laid_out):
        key = laid_out.places[id(tensor)][1]
        name = names[0]
        if key not in merged and BASE in name:
            merged |= _merged_layer(laid_out, name.rpartition(BASE)[0], active)
        files.add({key: merged.pop(key) if key in merged else _value(laid_out, name, tensor, active)})
    (folder / INDEX).write_text(json.dumps(files.index(), indent=2, sort_keys=True))
    base = laid_out.base
    base.config.architectures = [type(base).__name__]
    base.config.save_pretrained(str(folder))
    if base.can_generate():
        base.generation_config.save_pretrained(str(folder))


def _check(laid_out: LaidOut) -> None:
    """Raises InputError for an adapter that cannot be merged tensor by tensor."""
    tied = [names for names, tensor in named_tensors(laid_out.model) if id(tensor) in laid_out.places and names[1:]]
    if any(BASE in name or ORIGINAL in name for names in tied for name in names):
        raise InputError(
            "the base does not fit in memory, and the adapter is on embeddings that are tied: merge where it does"
        )
    if any(getattr(config, "bias", "none") != "none" for config in laid_out.model.peft_config.values()):
        raise InputError("the base does not fit in memory, and the adapter has trained its biases: merge where it does")


def _in_file_order(laid_out: LaidOut) -> Iterator[tuple[list[str], torch.Tensor]]:
    """Yields the tensors of the base's files, with their names in the model, in the order of the files."""

    def position(item: tuple[list[str], torch.Tensor]) -> tuple[str, int]:
        stored, _ = laid_out.places[id(item[1])]
        return stored.file, stored.start

    found = [(names, tensor) for names, tensor in named_tensors(laid_out.model) if id(tensor) in laid_out.places]
    yield from sorted(found, key=position)


def _merged_layer(laid_out: LaidOut, name: str, active: Sequence[str]) -> dict[str, torch.Tensor]:
    """Returns the tensors of a layer with its adapter merged into them, by their names in the files."""
    layer: Any = laid_out.model.get_submodule(name)
    base = layer.get_base_layer()
    mine = {n: t for n, t in base.named_parameters(recurse=False) if id(t) in laid_out.places}
    for attribute, tensor in mine.items():
        value = laid_out.read(tensor)
        assert value is not None
        put(base, [attribute], value)
    layer.merge(safe_merge=True, adapter_names=list(active))
    done = {laid_out.places[id(t)][1]: base.get_parameter(n).detach().contiguous() for n, t in mine.items()}
    for attribute, tensor in mine.items():
        base._parameters[attribute] = tensor
        assert tensor.device == META
    return done


def _value(laid_out: LaidOut, name: str, tensor: torch.Tensor, active: Sequence[str]) -> torch.Tensor:
    """Returns the trained tensor for a module that was trained in full, else the tensor in the file."""
    if ORIGINAL in name:
        wrapper, _, rest = name.partition(ORIGINAL)
        trained: dict[str, torch.Tensor] = dict(laid_out.model.named_parameters())
        if (whole := f"{wrapper}{COPY}{active[0]}.{rest}") in trained:
            return trained[whole].detach().to(tensor.dtype).contiguous()
    value = laid_out.read(tensor)
    assert value is not None
    return value
