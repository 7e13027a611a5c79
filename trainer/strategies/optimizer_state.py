"""Optimizer state as named full tensors, so that any strategy on any number of ranks can load it.

Each entry of the state of parameter ``p`` is saved as ``p.<key>``. A tensor with the parameter's shape is sharded like
the parameter; anything else (a step counter, a quantisation table) is the same on every rank. Python integers are
saved as int64 scalars, a type that no optimizer here uses for a tensor of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from trainer.errors import CorruptObject

Whole = Callable[[torch.Tensor], torch.Tensor]
Spread = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
PAGED_KEYS = ("state1", "state2")
"""The moments of bitsandbytes' optimizers, which its paged ones keep in unified memory."""


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter], whole: Whole
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name, full tensor on the CPU). Collective: every rank iterates to the end."""
    for name, parameter in parameters.items():
        for key, value in optimizer.state[parameter].items():
            if isinstance(value, int):
                yield f"{name}.{key}", torch.tensor(value, dtype=torch.int64)
            else:
                yield f"{name}.{key}", whole(value.detach()).cpu()


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, torch.nn.Parameter],
    names: Mapping[str, list[str]],
    read: Callable[[str], torch.Tensor],
    spread: Spread,
) -> None:
    """Loads the state into ``optimizer``. ``names``: the state keys that were saved for each parameter; ``read``
    returns a full tensor by its saved name.

    Raises CorruptObject when state was saved for a parameter that does not exist here."""
    check_owners(names, parameters)
    for name, parameter in parameters.items():
        state: dict[str, Any] = {}
        for key in names.get(name, []):
            saved = read(f"{name}.{key}")
            if key in PAGED_KEYS and getattr(optimizer, "is_paged", False):
                # In the optimizer's own paged memory: a plain tensor would stay on the device from now on. Parameters
                # are never sharded here: no sharding strategy accepts these optimizers.
                paged: Any = optimizer
                state[key] = paged.get_state_buffer(parameter, dtype=saved.dtype).copy_(saved)
            else:
                state[key] = _restored(saved, parameter, spread)
        optimizer.state[parameter] = state


def check_owners(names: Iterable[str], parameters: Iterable[str]) -> None:
    """Raises CorruptObject when state was saved for a parameter that does not exist here."""
    foreign = sorted(set(names) - set(parameters))
    if foreign:
        raise CorruptObject(f"the optimizer's state is that of another model: nothing here is called {foreign[:3]}")


def _restored(saved: torch.Tensor, parameter: torch.nn.Parameter, spread: Spread) -> Any:
    if saved.ndim == 0 and saved.dtype == torch.int64:
        return int(saved)
    if saved.shape == parameter.shape and saved.is_floating_point():
        return spread(saved, parameter)
    # A scalar step counter stays on the CPU, where torch's optimizers keep it.
    return saved if saved.ndim == 0 else saved.to(parameter.device)
