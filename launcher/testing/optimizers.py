"""The contract of an optimizer: a run continues from its saved state."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from trainer.distributed.world import World
from trainer.optim import make_optimizer
from trainer.recipe import OptimizerSection
from trainer.strategies.held import Itself
from trainer.strategies.optimizer_state import OptimizerState

Parameters = dict[str, torch.nn.Parameter]
MATRICES = frozenset({"big.weight", "small.weight"})


def section(name: str = "adamw", **more: Any) -> OptimizerSection:
    return OptimizerSection.model_validate({"name": name, "lr": 1e-2, **more})


def parameters() -> Parameters:
    """Sizes on both sides of 4,096 elements, from which on states are quantised; ``m`` has an incomplete block."""
    shapes = {"big.weight": (96, 64), "small.weight": (8, 4), "norm.weight": (64,), "m": (5000,)}
    generator = torch.Generator().manual_seed(1)
    return {n: torch.nn.Parameter(torch.randn(s, generator=generator)) for n, s in shapes.items()}


class Made:
    """An optimizer of named parameters, with its state as a strategy reads and writes it."""

    def __init__(self, name: str, named: Parameters, held: Mapping[str, Itself] | None = None, **more: Any) -> None:
        settings = section(name, **more)
        self.named, row = named, settings.row
        optimizer: Any = make_optimizer(settings, named, MATRICES if row.holds == "matrices" else frozenset())
        self.optimizer = optimizer
        self.held = held or {n: Itself(p) for n, p in named.items()}
        nobody = cast(World, None)
        self.state = OptimizerState(
            self.optimizer, row, self.held, nobody, lambda t: t, lambda t, like: t.to(like.dtype)
        )
        if row.averages:
            self.optimizer.train()

    def step(self, number: int) -> None:
        generator = torch.Generator().manual_seed(100 + number)
        for parameter in self.named.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, file: Path) -> set[str]:
        saved = {name: tensor.clone() for name, tensor in self.state.tensors()}
        save_file(saved, file)
        return {name.rsplit(".", 1)[1] for name in saved}

    def load(self, file: Path) -> None:
        with safe_open(file, framework="pt") as opened:
            keys: dict[str, list[str]] = defaultdict(list)
            for name in opened.keys():  # noqa: SIM118 - a safetensors file is no mapping
                parameter, key = name.rsplit(".", 1)
                keys[parameter].append(key)
            self.state.load(keys, opened.get_tensor)


def copies(named: Parameters) -> Parameters:
    return {n: torch.nn.Parameter(p.detach().clone()) for n, p in named.items()}


def continues_from_its_saved_state_to_the_bit(name: str, folder: Path) -> None:
    straight = Made(name, parameters(), weight_decay=0.1)
    for number in range(3):
        straight.step(number)
    kinds = straight.save(folder / "state")
    assert kinds
    resumed = Made(name, copies(straight.named), weight_decay=0.1)
    resumed.load(folder / "state")
    for made in (straight, resumed):
        for group in made.optimizer.param_groups:  # as a step of a strategy does
            torch.as_tensor(group["lr"]).fill_(1e-2) if torch.is_tensor(group["lr"]) else group.update(lr=1e-2)
    for number in range(3, 8):
        straight.step(number)
        resumed.step(number)
    for n in straight.named:
        assert torch.equal(straight.named[n], resumed.named[n]), n
    assert resumed.save(folder / "again") == kinds


def goes_elsewhere_without_its_state(name: str, folder: Path) -> None:
    straight = Made(name, parameters())
    straight.step(0)
    fresh = Made(name, copies(straight.named))
    straight.step(1)
    fresh.step(1)
    assert not torch.equal(straight.named["big.weight"], fresh.named["big.weight"])
    assert not torch.equal(straight.named["m"], fresh.named["m"])


def changes_no_weight_when_it_is_loaded(name: str, folder: Path) -> None:
    made = Made(name, parameters(), weight_decay=0.1)
    made.step(0)
    made.save(folder / "state")
    before = copies(made.named)
    made.load(folder / "state")
    assert all(torch.equal(before[n], p) for n, p in made.named.items())
    assert all(p.grad is None for p in made.named.values())


CHECKS = (
    continues_from_its_saved_state_to_the_bit,
    goes_elsewhere_without_its_state,
    changes_no_weight_when_it_is_loaded,
)
"""Functions of an optimizer's name and an empty folder, which raise AssertionError."""
