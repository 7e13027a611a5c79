"""The optimizers, over named parameters. Weight decay applies to matrices only: not to biases, norms and magnitudes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from trainer.recipe.optimizers import OPTIMIZERS
from trainer.recipe.sections.optimizer import OptimizerSection

if TYPE_CHECKING:
    import torch


def make_optimizer(
    section: OptimizerSection,
    parameters: Mapping[str, torch.nn.Parameter],
    lr_scale: Callable[[str], float] = lambda name: 1.0,
) -> torch.optim.Optimizer:
    """Returns the recipe's optimizer, with one parameter group for each pair of learning-rate scale and weight decay.

    ``lr_scale(name)``: a parameter's learning rate as a multiple of the step's."""
    members: dict[tuple[float, bool], list[torch.nn.Parameter]] = defaultdict(list)
    for name, parameter in parameters.items():
        members[lr_scale(name), parameter.ndim < 2].append(parameter)
    groups = [
        {"params": members[scale, small], "weight_decay": 0.0 if small else section.weight_decay, "lr_scale": scale}
        for scale, small in sorted(members)
    ]
    settings = {"lr": section.lr, "betas": tuple(section.betas), "eps": section.eps}
    optimizer: torch.optim.Optimizer = OPTIMIZERS.load(section.name)(groups, **settings)
    return optimizer


def adamw(groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101), torch's own."""
    import torch

    return torch.optim.AdamW(groups, **settings)


def adamw_8bit(groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
    """Block-wise 8-bit states (Dettmers et al. 2021, arXiv:2110.02861), by bitsandbytes."""
    from bitsandbytes.optim.adamw import AdamW8bit

    return AdamW8bit(groups, **settings)


def paged_adamw_8bit(groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
    """8-bit states in unified memory, which the driver moves to the host when the device is full."""
    from bitsandbytes.optim.adamw import PagedAdamW8bit

    return PagedAdamW8bit(groups, **settings)
