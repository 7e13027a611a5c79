"""A model that is larger than any one memory, for reading only: laid out without weights, spread by accelerate.

    meta model → adapters → a device for each layer → weights brought there; those on the disk stay in the model's files

What lies on the disk is read from the model's own safetensors at each forward, and from one more file for adapters.
(peft's way for such models copies every file under other names, into whatever folder the process stands in.)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from trainer.errors import InputError
from trainer.model.files.safetensors_index import TensorLocation, read_headers
from trainer.model.files.weight_source import WeightSource
from trainer.model.key_mapping import match_names, state_of
from trainer.model.meta import META, NeedsFullLoad, meta_model
from trainer.model.placement import Placement
from trainer.recipe.sections.model import ModelSection

DISK = "disk"
BESIDE = "beside.safetensors"

Attach = Callable[[Any], Any]
"""Puts the adapters on a base that has no weights; the model."""


class LaidOut(NamedTuple):
    """A model without weights, and where those of its base are: by the identity of a tensor, what is stored under
    which name in a file of ``folder``. ``kept`` are those tensors, alive, for an identity to mean something."""

    model: Any
    base: Any
    folder: Path
    places: Mapping[int, tuple[TensorLocation, str]]
    kept: list[torch.Tensor]

    def read(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """What the files hold of a tensor of the model, in its type; None for one of the adapters'."""
        from safetensors import safe_open

        if id(tensor) not in self.places:
            return None
        stored, key = self.places[id(tensor)]
        with safe_open(self.folder / stored.file, framework="pt") as file:
            value: torch.Tensor = file.get_tensor(key)
        return value.to(tensor.dtype)


def lay_out(section: ModelSection, folder: Path, device: torch.device, attach: Attach, auto_class: Any) -> LaidOut:
    """Raises InputError when the architecture can only be loaded whole. The files have to stay where they are."""
    source = WeightSource(str(folder))
    try:
        base: Any = meta_model(section, folder, device, full=False, checkpointing=False, auto_class=auto_class)
        stored = read_headers(source, section.path)
        names = match_names(base, stored, section.path)
    except NeedsFullLoad as reason:
        raise InputError(f"{section.path} is taken in parts here, which cannot be: {reason}") from reason
    finally:
        source.close()
    tensors = dict(state_of(base))
    places = {id(tensors[name]): (stored[key], key) for name, key in names.items()}
    kept = [tensors[name] for name in names]
    model = attach(base)
    made = [names[0] for names, tensor in named_tensors(model) if tensor.is_meta and id(tensor) not in places]
    if made:
        raise InputError(
            f"{section.path} is taken in parts here, and its adapter is more than what its file holds ({made[0]}): "
            "load it where the whole base fits in memory"
        )
    return LaidOut(model, base, folder, places, kept)


def spread(section: ModelSection, folder: Path, placement: Placement, attach: Attach, auto_class: Any) -> Any:
    """The model, in evaluation mode. Raises InputError like `lay_out`."""
    from accelerate import dispatch_model, infer_auto_device_map

    assert placement.limits is not None
    assert placement.disk is not None
    laid_out = lay_out(section, folder, placement.device, attach, auto_class)
    model, whole, limits = laid_out.model, list(laid_out.base._no_split_modules or ()), dict(placement.limits)
    map_ = infer_auto_device_map(model, max_memory=limits, no_split_module_classes=whole)
    index = _bring(laid_out, map_, Path(placement.disk))
    # A decoder layer comes as a whole: adapters read the weights of the layers that they are on.
    dispatch_model(model, map_, offload_dir=placement.disk, offload_index=index or None, preload_module_classes=whole)
    return model.eval()


def _bring(laid_out: LaidOut, map_: Mapping[str, Any], disk: Path) -> dict[str, dict[str, str]]:
    """Puts weights on the devices of ``map_``; where those for the disk are, by their names."""
    from safetensors.torch import save_file

    model = laid_out.model
    index: dict[str, dict[str, str]] = {}
    beside: dict[str, torch.Tensor] = {}
    for names, tensor in named_tensors(model):
        device = _device_of(names[0], map_)
        if device != DISK:
            value = laid_out.read(tensor)
            put(model, names, (tensor if value is None else value).to(device))
        elif id(tensor) in laid_out.places:
            stored, key = laid_out.places[id(tensor)]
            told = {"safetensors_file": str(laid_out.folder / stored.file), "weight_name": key}
            index |= {name: {**told, "dtype": str(tensor.dtype).removeprefix("torch.")} for name in names}
        elif isinstance(tensor, torch.nn.Parameter):
            beside[names[0]] = tensor.detach().contiguous()
            index |= {name: {"safetensors_file": str(disk / BESIDE), "weight_name": names[0]} for name in names}
            put(model, names, torch.empty_like(tensor, device=META))
    if beside:
        save_file(beside, disk / BESIDE)
    return index


def named_tensors(model: Any) -> Iterator[tuple[list[str], torch.Tensor]]:
    """Each parameter and buffer with all of its names."""
    named: dict[int, tuple[list[str], torch.Tensor]] = {}
    found = defaultdict(list)
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        found[id(tensor)].append(name)
        named[id(tensor)] = (found[id(tensor)], tensor)
    yield from named.values()


def _device_of(name: str, map_: Mapping[str, Any]) -> Any:
    while name not in map_ and name:
        name = name.rpartition(".")[0]
    return map_[name]


def put(model: Any, names: list[str], value: torch.Tensor) -> None:
    """In the place of a tensor, under all of its names."""
    parameter: torch.nn.Parameter | None = None
    for name in names:
        module_name, _, attribute = name.rpartition(".")
        module = model.get_submodule(module_name)
        if attribute in module._parameters:
            parameter = parameter or torch.nn.Parameter(value, requires_grad=False)
            module._parameters[attribute] = parameter
        else:
            module._buffers[attribute] = value
