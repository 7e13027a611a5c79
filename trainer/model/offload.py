"""Inference with a model that is larger than any one memory: built without weights, spread by accelerate.

    meta model → adapters → a device for each layer → weights loaded there; weights for the disk stay in their files

Weights on the disk are read from the model's own safetensors at each forward; those of adapters from one more file.
(peft copies every file of such a model under another name, into the process's current folder.)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from trainer.errors import InputError
from trainer.model.dequantise import QuantisedLocation, locate_weights
from trainer.model.files.safetensors_index import TensorLocation, read_headers
from trainer.model.files.weight_source import WeightSource
from trainer.model.key_mapping import match_names, state_of
from trainer.model.meta import META, NeedsFullLoad, meta_model
from trainer.model.placement import Placement
from trainer.recipe.sections.model import ModelSection

DISK = "disk"
BESIDE = "beside.safetensors"

Attach = Callable[[Any], Any]
"""Attaches the adapters to a base without weights, and returns the model."""


class LaidOut(NamedTuple):
    """A model without weights, and the location of its base's weights in the files of ``folder``.

    ``places``: location and stored name by ``id(tensor)``; ``kept`` keeps these tensors alive, so that no other object
    gets one of these ids."""

    model: Any
    base: Any
    folder: Path
    places: Mapping[int, tuple[TensorLocation, str]]
    kept: list[torch.Tensor]

    def read(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Reads a tensor of the base from the files, in the model's dtype; returns None for one of an adapter."""
        from safetensors import safe_open

        if id(tensor) not in self.places:
            return None
        stored, key = self.places[id(tensor)]
        with safe_open(self.folder / stored.file, framework="pt") as file:
            value: torch.Tensor = file.get_tensor(key)
        return value.to(tensor.dtype)


def lay_out(section: ModelSection, folder: Path, device: torch.device, attach: Attach, auto_class: Any) -> LaidOut:
    """Builds the model without weights. Its files must stay in ``folder`` while it is used.

    Raises InputError when the architecture can only be loaded whole, or the adapter has tensors that its file lacks."""
    source = WeightSource(str(folder))
    try:
        base: Any = meta_model(section, folder, device, full=False, checkpointing=False, auto_class=auto_class)
        stored = locate_weights(read_headers(source, section.path), base.stored_quantization, section.path)
        names = match_names(base, stored, section.path)
    except NeedsFullLoad as reason:
        raise InputError(f"{section.path} has to be loaded in parts here, and cannot be: {reason}") from reason
    finally:
        source.close()
    tensors = dict(state_of(base))
    joined = next((name for name, keys in names.items() if len(keys) > 1), None)
    if joined:
        raise InputError(
            f"{section.path} has to be loaded in parts here, and its {joined} is stored in several tensors"
        )
    places = {id(tensors[name]): (stored[key], key) for name, (key, *_) in names.items()}
    kept = [tensors[name] for name in names]
    model = attach(base)
    made = [names[0] for names, tensor in named_tensors(model) if tensor.is_meta and id(tensor) not in places]
    if made:
        raise InputError(
            f"{section.path} has to be loaded in parts here, and its adapter has weights that its file lacks "
            f"({made[0]}): load it where the whole base fits in memory"
        )
    return LaidOut(model, base, folder, places, kept)


def spread(section: ModelSection, folder: Path, placement: Placement, attach: Attach, auto_class: Any) -> Any:
    """Loads the model over the devices of ``placement``, in evaluation mode. Raises InputError like `lay_out`."""
    from accelerate import dispatch_model, infer_auto_device_map

    assert placement.limits is not None
    assert placement.disk is not None
    laid_out = lay_out(section, folder, placement.device, attach, auto_class)
    if any(isinstance(place, QuantisedLocation) for place, _ in laid_out.places.values()):
        raise InputError(
            f"{section.path} does not fit in memory once its weights are dequantised: use --quantization nf4, or name "
            "the unquantised model"
        )
    model, whole, limits = laid_out.model, list(laid_out.base._no_split_modules or ()), dict(placement.limits)
    map_ = infer_auto_device_map(model, max_memory=limits, no_split_module_classes=whole)
    index = _load(laid_out, map_, Path(placement.disk))
    # Decoder layers are loaded as a whole: adapters read the weight of the linear layer that they wrap outside its
    # own forward, and accelerate would load it there only.
    dispatch_model(model, map_, offload_dir=placement.disk, offload_index=index or None, preload_module_classes=whole)
    return model.eval()


def _load(laid_out: LaidOut, map_: Mapping[str, Any], disk: Path) -> dict[str, dict[str, str]]:
    """Loads weights onto the devices of ``map_``; returns accelerate's index of those on the disk, by name."""
    from safetensors.torch import save_file

    model = laid_out.model
    index: dict[str, dict[str, str]] = {}
    beside: dict[str, torch.Tensor] = {}
    for names, tensor in named_tensors(model):
        layer = names[0]
        while layer and layer not in map_:
            layer = layer.rpartition(".")[0]
        device = map_[layer]
        if device != DISK:
            value = laid_out.read(tensor)
            put(model, names, (tensor if value is None else value).to(device))
        elif id(tensor) in laid_out.places:
            stored, key = laid_out.places[id(tensor)]
            place = {"safetensors_file": str(laid_out.folder / stored.file), "weight_name": key}
            index |= {name: {**place, "dtype": str(tensor.dtype).removeprefix("torch.")} for name in names}
        elif isinstance(tensor, torch.nn.Parameter):
            beside[names[0]] = tensor.detach().contiguous()
            index |= {name: {"safetensors_file": str(disk / BESIDE), "weight_name": names[0]} for name in names}
            put(model, names, torch.empty_like(tensor, device=META))
    if beside:
        save_file(beside, disk / BESIDE)
    return index


def named_tensors(model: Any) -> Iterator[tuple[list[str], torch.Tensor]]:
    """Yields each parameter and buffer with all of its names."""
    named: dict[int, tuple[list[str], torch.Tensor]] = {}
    found = defaultdict(list)
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        found[id(tensor)].append(name)
        named[id(tensor)] = (found[id(tensor)], tensor)
    yield from named.values()


def put(model: Any, names: list[str], value: torch.Tensor) -> None:
    """Replaces a tensor of the model with ``value``, under all of its names."""
    parameter: torch.nn.Parameter | None = None
    for name in names:
        module_name, _, attribute = name.rpartition(".")
        module = model.get_submodule(module_name)
        if attribute in module._parameters:
            parameter = parameter or torch.nn.Parameter(value, requires_grad=False)
            module._parameters[attribute] = parameter
        else:
            module._buffers[attribute] = value
