"""Construction of the optimizers, over named parameters. Weight decay applies to matrices only: not to biases, norms
and magnitudes."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from trainer.errors import InputError
from trainer.recipe.sections.optimizer import SETTINGS, OptimizerSection

if TYPE_CHECKING:
    import torch

OWN = ("self", "params", "groups", "lr", *SETTINGS)
"""Arguments of a constructor that do not come from `optimizer.settings`."""


def make_optimizer(
    section: OptimizerSection,
    parameters: Mapping[str, torch.nn.Parameter],
    matrices: frozenset[str] = frozenset(),
    *,
    lr_scale: Callable[[str], float] = lambda name: 1.0,
) -> torch.optim.Optimizer:
    """Returns the recipe's optimizer, with one parameter group for each learning-rate scale, weight decay and kind.

    ``lr_scale(name)``: a parameter's learning rate as a multiple of the step's. ``matrices``: the parameters that an
    optimizer for matrices updates as such; their groups have ``matrices: True``. Raises InputError if the library is
    missing, for a GPU that the optimizer does not run on, and for settings that its constructor does not take."""
    row = section.row
    make = row.load()
    _check_device(section, parameters)
    members: dict[tuple[float, bool, bool], list[torch.nn.Parameter]] = defaultdict(list)
    for name, parameter in parameters.items():
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves empty vectors behind, with the shape
        members[lr_scale(name), len(shape) < 2, name in matrices].append(parameter)
    groups = [
        {
            "params": members[scale, small, matrix],
            "weight_decay": 0.0 if small else section.weight_decay,
            "lr_scale": scale,
            **({"matrices": True} if matrix else {}),
        }
        for scale, small, matrix in sorted(members)
    ]
    return _built(section, make, groups)


def _built(section: OptimizerSection, make: Any, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    import torch

    row = section.row
    used = section.given() if row.named_by_user else row.uses
    arguments = {name: getattr(section, name) for name in used if name in SETTINGS and name != "weight_decay"}
    _check_settings(section, make, {**arguments, **section.settings})
    settings = {name: tuple(v) if isinstance(v, list) else v for name, v in section.settings.items()}
    try:
        optimizer = make(groups, lr=section.lr, **row.fixed, **arguments, **settings)
    except (TypeError, ValueError) as error:
        raise InputError(f"optimizer.name {section.name} cannot be made with these settings: {error}") from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InputError(
            f"optimizer.name {section.name!r} gives a {type(optimizer).__name__}, which is no torch.optim.Optimizer"
        )
    return optimizer


def _check_settings(section: OptimizerSection, make: Any, settings: Mapping[str, Any]) -> None:
    try:
        takes = inspect.signature(make).parameters
    except (TypeError, ValueError):  # built in, without a signature
        return
    if any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        return
    known = [name for name in takes if name not in OWN and name not in section.row.fixed]
    for name in settings:
        if name not in takes:
            place = f"settings.{name}" if name in section.settings else name
            raise InputError(
                f"optimizer.{place}: {section.name} does not take it; "
                + (f"its settings are {', '.join(known)}" if known else "it has no settings")
            )


def _check_device(section: OptimizerSection, parameters: Mapping[str, torch.nn.Parameter]) -> None:
    import torch

    needed = section.row.capability
    device = next((p.device for p in parameters.values() if p.device.type == "cuda"), None)
    if needed is None or device is None:
        return
    if (has := torch.cuda.get_device_capability(device)) < needed:
        raise InputError(
            f"optimizer.name {section.name} needs a GPU of CUDA capability {needed[0]}.{needed[1]}, and this one has "
            f"{has[0]}.{has[1]}; use adamw_torchao_8bit"
        )
