"""Helpers to attach an adapter to a base model on the meta device, with the adapter's initial values on the host."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

META = torch.device("meta")
COPY, ORIGINAL = ".modules_to_save.", ".original_module."


class StayingOnHost(TorchFunctionMode):
    """Skips moves of tensors to the meta device: peft moves each tensor that it creates to the device of the base."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.to:
            places = [torch.device(a) for a in (*args[1:2], kwargs.get("device")) if isinstance(a, str | torch.device)]
            if places == [META]:
                kwargs.pop("device", None)
                args = (args[0], *(a for a in args[1:] if isinstance(a, torch.dtype)))
                return func(*args, **kwargs) if len(args) > 1 or kwargs.get("dtype") else args[0]
        return func(*args, **kwargs)


def take_values(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Returns the parameters that have values, by name, and replaces them on the model by ones on the meta device."""
    taken: dict[str, torch.Tensor] = {}
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            continue
        taken[name] = parameter.detach()
        module_name, _, attribute = name.rpartition(".")
        empty = torch.empty_like(parameter, device=META)
        model.get_submodule(module_name)._parameters[attribute] = torch.nn.Parameter(empty, parameter.requires_grad)
    return taken


def original_of(name: str, adapter_name: str) -> str | None:
    """Returns the name of the base parameter from which ``name`` gets its initial values; None unless ``name`` belongs
    to a module that is trained in full next to the adapter."""
    module, marker, rest = name.partition(f"{COPY}{adapter_name}.")
    return f"{module}{ORIGINAL}{rest}" if marker else None


def elements_of_rows(rows: Iterator[torch.Tensor], first_row: int, columns: int, start: int, stop: int) -> torch.Tensor:
    """Returns elements ``start`` to ``stop`` of a flattened tensor. ``rows`` yields its rows, beginning with
    ``first_row``; ``columns`` is the number of elements per row."""
    parts = [part.reshape(-1) for part in rows]
    flat = torch.cat(parts) if parts else torch.empty(0)
    return flat[start - first_row * columns : stop - first_row * columns]
