"""The names of targets that peft gets, and what it makes of them.

peft reads a LoRA adapter's targets by the names that transformers 4 had for experts. In about 25 architectures it takes
every target that ends in ``gate_proj``, ``up_proj`` or ``down_proj`` for an expert, also those of dense and shared
layers. While muster attaches an adapter, peft takes the names as they are. In the saved configuration, such a layer is
named by its parameter (``down_proj.weight``), so that plain peft puts the same matrices on the same layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from trainer.adapters.targets import matched_modules
from trainer.errors import InputError
from trainer.experts import is_mixture

WEIGHT = ".weight"
SHOWN = 3


@contextmanager
def names_as_given(base: Any, config: Any) -> Iterator[None]:
    """Keeps peft from reading the targets of ``config`` by their old names in the context, if they are full names."""
    full = {name for name, _ in base.named_modules()}.issuperset(getattr(config, "target_modules", None) or ())
    if not is_mixture(base) or not full:
        yield
        return
    # peft looks for the model's type in its table of architectures whose experts had other names.
    base.config.model_type = ""
    try:
        yield
    finally:
        del base.config.model_type


def as_saved(config: Any, base: Any) -> None:
    """Changes a LoRA configuration in place into one that plain peft reads as it was attached."""
    if config.target_modules is None or not is_mixture(base):
        return
    moved = _moved_by_peft(config.target_modules, base)
    config.target_modules = sorted(set(config.target_modules) - moved)
    config.target_parameters = [*(config.target_parameters or ()), *(f"{name}{WEIGHT}" for name in sorted(moved))]


def as_attached(config: Any, base: Any) -> None:
    """Reverts `as_saved`, in place: a quantised layer has no parameter of the shape that peft would look for."""
    linear = {n: m for n, m in base.named_modules() if isinstance(m, torch.nn.Linear)}
    named = list(getattr(config, "target_parameters", None) or ())
    layers = [p.removesuffix(WEIGHT) for p in named if p.endswith(WEIGHT) and p.removesuffix(WEIGHT) in linear]
    if layers and not isinstance(config.target_modules, str):
        config.target_modules = sorted({*(config.target_modules or ()), *layers})
        config.target_parameters = [p for p in named if p.removesuffix(WEIGHT) not in layers]


def _moved_by_peft(names: Iterable[str], base: Any) -> set[str]:
    """Returns the layers that peft would take for experts."""
    from peft import LoraConfig

    # peft has no public way to ask, and its table changes between versions.
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    def moves(leaf: str) -> bool:
        config = LoraConfig(target_modules=[leaf])
        try:
            convert_peft_config_for_transformers(config, base, None)
        except ValueError:  # it wants the other half of a fused matrix beside it
            return True
        return leaf not in (config.target_modules or ())

    leaves = {leaf: moves(leaf) for leaf in {name.rpartition(".")[2] for name in names}}
    return {name for name in names if leaves[name.rpartition(".")[2]]}


def lost_by_peft(model: Any, names: Mapping[str, torch.Tensor]) -> set[str]:
    """Returns the saved names of the adapter's tensors that plain peft does not load into a base model of this
    architecture: it renames them by the rules for the base model's older files, and then finds no place for them."""
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

    empty = {name: torch.empty(tensor.shape, device="meta") for name, tensor in names.items()}
    config = model.peft_config[model.active_adapters[0]]
    return empty.keys() - convert_peft_adapter_state_dict_for_transformers(model, config, empty).keys()


def refused_by_peft(base: Any, names: Iterable[str]) -> set[str]:
    """Returns the layers that peft refuses to adapt in this architecture: those of state-space models whose weight is
    read by a kernel, and not by the layer itself."""
    from peft import LoraConfig, get_peft_model

    def refuses(leaf: str) -> bool:
        stub: Any = torch.nn.Module()
        stub.config = base.config
        stub.add_module(leaf, torch.nn.Linear(1, 1, device="cpu"))
        try:
            with torch.random.fork_rng():
                get_peft_model(stub, LoraConfig(target_modules=[leaf]))
        except ValueError:
            return True
        return False

    names = set(names) - _moved_by_peft(names, base)
    refused = {leaf for leaf in {name.rpartition(".")[2] for name in names} if refuses(leaf)}
    return {name for name in names if name.rpartition(".")[2] in refused}


def wanted_targets(base: torch.nn.Module, config: Any) -> set[str] | None:
    """Returns the full names of the modules and parameters that peft has to adapt; None if it chooses them."""
    targets = getattr(config, "target_modules", None)
    if targets is None or targets == "all-linear":
        return None
    whole = [f".{name}." for name in getattr(config, "modules_to_save", None) or ()]
    modules = matched_modules(base, targets if isinstance(targets, str) else list(targets))
    inside = {name for name in modules if any(part in f".{name}." for part in whole)}
    return (set(modules) - inside) | set(getattr(config, "target_parameters", None) or ())


def attached_targets(model: torch.nn.Module) -> dict[str, str]:
    """Returns the full name in the base model of each layer or parameter that has an adapter, by the name of peft's
    layer around it; the innermost of several around one layer comes first."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = {}
    for name, module in model.named_modules():
        # Trained tokens are no target: peft puts a layer of its own into the wrapper of their embeddings.
        if isinstance(module, BaseTunerLayer) and not name.endswith(".token_adapter"):
            parameter = getattr(module, "parameter_name", None)
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            found[name] = f"{plain}.{parameter}" if parameter else plain
    return dict(reversed(found.items()))


def check_attached(model: torch.nn.Module, wanted: set[str] | None) -> None:
    """Raises InputError when peft has adapted other modules and parameters than ``wanted``."""
    if wanted is None:
        return
    got = set(attached_targets(model).values())
    lost, gained = sorted(wanted - got), sorted(got - wanted)
    if lost or gained:
        parts = ((lost, "have none"), (gained, "have one that was not asked for"))
        what = " and ".join(f"{len(names)} {verb} ({', '.join(names[:SHOWN])})" for names, verb in parts if names)
        raise InputError(f"adapter.target_modules: of the layers that peft adapts, {what}; name others")
