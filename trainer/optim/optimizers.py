"""The optimizers, each made over named parameters. Only matrices decay: biases, norms and magnitudes do not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trainer.recipe.optimizer import OptimizerSection
from trainer.registry import OPTIMIZERS

if TYPE_CHECKING:
    import torch


def make_optimizer(section: OptimizerSection, parameters: Mapping[str, torch.nn.Parameter]) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in parameters.values() if p.ndim >= 2], "weight_decay": section.weight_decay},
        {"params": [p for p in parameters.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    settings = {"lr": section.lr, "betas": tuple(section.betas), "eps": section.eps}
    optimizer: torch.optim.Optimizer = OPTIMIZERS.load(section.name)([g for g in groups if g["params"]], **settings)
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
