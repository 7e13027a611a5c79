"""Optimizers, the state that they go on from, and learning-rate schedules."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from trainer.errors import CorruptObject
from trainer.optim import learning_rate, make_optimizer
from trainer.recipe import OptimizerSection, ScheduleSection
from trainer.recipe.optimizers import OPTIMIZERS, SCHEDULES
from trainer.strategies.optimizer_state import load_optimizer_state, optimizer_state

Parameters = dict[str, torch.nn.Parameter]
ON_CPU = [name for name, row in OPTIMIZERS.items() if not row.paged]


def section(name: str = "adamw", **more: Any) -> OptimizerSection:
    return OptimizerSection(name=name, lr=1e-2, **more)


def parameters() -> Parameters:
    """Sizes on both sides of 4,096 elements, from which on bitsandbytes keeps eight bits."""
    shapes = {"big.weight": (96, 64), "small.weight": (8, 4), "norm.weight": (64,), "m": (5000,)}
    generator = torch.Generator().manual_seed(1)
    return {n: torch.nn.Parameter(torch.randn(s, generator=generator)) for n, s in shapes.items()}


def step(optimizer: torch.optim.Optimizer, named: Parameters, number: int) -> None:
    generator = torch.Generator().manual_seed(100 + number)
    for parameter in named.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def saved(optimizer: torch.optim.Optimizer, named: Parameters, file: Path) -> None:
    state = optimizer_state(optimizer, named, lambda tensor: tensor)
    save_file({name: tensor.clone() for name, tensor in state}, file)


def loaded(optimizer: torch.optim.Optimizer, named: Parameters, file: Path) -> None:
    with safe_open(file, framework="pt") as opened:
        keys: dict[str, list[str]] = defaultdict(list)
        for name in opened.keys():  # noqa: SIM118 - a safetensors file is no mapping
            parameter, key = name.rsplit(".", 1)
            keys[parameter].append(key)
        load_optimizer_state(optimizer, named, keys, opened.get_tensor, lambda whole, like: whole.to(like.dtype))


@pytest.mark.parametrize("name", ON_CPU)
def test_an_optimizer_goes_on_from_its_saved_state_to_the_bit(name: str, tmp_path: Path) -> None:
    straight = parameters()
    optimizer = make_optimizer(section(name, weight_decay=0.1), straight)
    for number in range(3):
        step(optimizer, straight, number)
    saved(optimizer, straight, tmp_path / "state")
    resumed = {n: torch.nn.Parameter(p.detach().clone()) for n, p in straight.items()}
    other = make_optimizer(section(name, weight_decay=0.1), resumed)
    loaded(other, resumed, tmp_path / "state")
    for number in range(3, 8):
        step(optimizer, straight, number)
        step(other, resumed, number)
    for n in straight:
        assert torch.equal(straight[n], resumed[n]), n
    saved(other, resumed, tmp_path / "again")
    with safe_open(tmp_path / "again", framework="pt") as file:
        kinds = {k.rsplit(".", 1)[1] for k in file.keys()}  # noqa: SIM118
    assert kinds >= ({"step", "exp_avg", "exp_avg_sq"} if name == "adamw" else {"step", "state1", "absmax1", "qmap1"})


@pytest.mark.parametrize("name", ON_CPU)
def test_without_its_state_it_would_go_elsewhere(name: str) -> None:
    straight = parameters()
    optimizer = make_optimizer(section(name), straight)
    step(optimizer, straight, 0)
    fresh = {n: torch.nn.Parameter(p.detach().clone()) for n, p in straight.items()}
    other = make_optimizer(section(name), fresh)
    step(optimizer, straight, 1)
    step(other, fresh, 1)
    assert not any(torch.equal(straight[n], fresh[n]) for n in straight)


def test_eight_bits_are_eight_bits() -> None:
    named = parameters()
    optimizer = make_optimizer(section("adamw_8bit"), named)
    step(optimizer, named, 0)
    dtypes = {n: optimizer.state[p]["state1"].dtype for n, p in named.items()}
    assert dtypes == {
        "big.weight": torch.uint8, "m": torch.uint8, "small.weight": torch.float32, "norm.weight": torch.float32,
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_moments_of_a_paged_optimizer_come_back_into_memory_of_its_own(tmp_path: Path) -> None:
    named = parameters()
    optimizer = make_optimizer(section("paged_adamw_8bit"), named)
    step(optimizer, named, 0)
    saved(optimizer, named, tmp_path / "state")
    other: Any = make_optimizer(section("paged_adamw_8bit"), named)
    made: list[torch.Tensor] = []
    get_buffer = other.get_state_buffer
    other.get_state_buffer = lambda parameter, dtype: made.append(get_buffer(parameter, dtype=dtype)) or made[-1]
    loaded(other, named, tmp_path / "state")
    assert len(made) == 2 * len(named)
    for parameter in named.values():
        for key in ("state1", "state2"):
            assert any(other.state[parameter][key] is buffer for buffer in made)
            assert torch.equal(other.state[parameter][key], optimizer.state[parameter][key])
    step(other, named, 1)


def test_a_state_before_any_step_is_empty_and_loads(tmp_path: Path) -> None:
    named = parameters()
    optimizer = make_optimizer(section(), named)
    saved(optimizer, named, tmp_path / "state")
    loaded(optimizer, named, tmp_path / "state")
    step(optimizer, named, 0)


def test_state_of_another_model_is_refused(tmp_path: Path) -> None:
    named = parameters()
    optimizer = make_optimizer(section(), named)
    step(optimizer, named, 0)
    saved(optimizer, named, tmp_path / "state")
    fewer = {n: p for n, p in parameters().items() if n != "m"}
    with pytest.raises(CorruptObject, match=r"nothing here is called \['m'\]"):
        loaded(make_optimizer(section(), fewer), fewer, tmp_path / "state")


def test_only_matrices_decay() -> None:
    named = parameters()
    optimizer = make_optimizer(section(weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6), named)
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert {n: decays[id(p)] for n, p in named.items()} == {
        "big.weight": 0.1, "small.weight": 0.1, "norm.weight": 0.0, "m": 0.0,
    }  # fmt: skip
    for group in optimizer.param_groups:
        assert (group["lr"], tuple(group["betas"]), group["eps"]) == (1e-2, (0.8, 0.95), 1e-6)
    before = {n: p.detach().clone() for n, p in named.items()}
    for parameter in named.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for n, p in named.items():
        assert torch.equal(p, before[n] * (1 - 1e-2 * 0.1) if p.ndim == 2 else before[n]), n


def test_a_model_of_matrices_alone_has_one_group() -> None:
    named = {n: p for n, p in parameters().items() if p.ndim == 2}
    assert len(make_optimizer(section(), named).param_groups) == 1


RATES: list[tuple[dict[str, Any], list[float]]] = [
    ({"name": "constant"}, [1.0] * 8),
    ({"name": "constant", "warmup_steps": 4}, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ({"name": "constant", "warmup_ratio": 0.4}, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ({"name": "linear"}, [1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
    ({"name": "linear", "warmup_steps": 4}, [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]),
    ({"name": "linear", "warmup_steps": 4, "min_lr_ratio": 0.2}, [0.25, 0.5, 0.75, 1.0, 1.0, 0.8, 0.6, 0.4]),
    ({"name": "linear", "warmup_steps": 8}, [0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0]),
    ({"name": "cosine"}, [1.0, 0.961940, 0.853553, 0.691342, 0.5, 0.308658, 0.146447, 0.038060]),
    ({"name": "cosine", "warmup_steps": 4}, [0.25, 0.5, 0.75, 1.0, 1.0, 0.853553, 0.5, 0.146447]),
    ({"name": "cosine", "warmup_steps": 4, "min_lr_ratio": 0.5}, [0.25, 0.5, 0.75, 1.0, 1.0, 0.926777, 0.75, 0.573223]),
]


@pytest.mark.parametrize(("settings", "rates"), RATES)
def test_learning_rates(settings: dict[str, Any], rates: list[float]) -> None:
    schedule = ScheduleSection(**settings)
    assert [learning_rate(schedule, 3e-4, s, 8) / 3e-4 for s in range(1, 9)] == pytest.approx(rates, abs=1e-6)


@pytest.mark.parametrize("name", SCHEDULES.names())
def test_the_step_after_the_last_one_reaches_the_end_and_stays(name: str) -> None:
    floor, end = ({"min_lr_ratio": 0.1}, 0.1) if SCHEDULES[name].falls else ({}, 1.0)
    schedule = ScheduleSection(name=name, warmup_steps=2, **floor)
    for s in (9, 10, 1000):
        assert learning_rate(schedule, 2.0, s, 8) == pytest.approx(2.0 * end)


@pytest.mark.parametrize("name", [name for name, row in SCHEDULES.items() if row.falls])
def test_a_rate_never_rises_after_the_warm_up_and_is_never_zero_in_a_run(name: str) -> None:
    rate: Callable[[int], float] = lambda s: learning_rate(ScheduleSection(name=name, warmup_steps=3), 1.0, s, 50)  # noqa: E731
    rates = [rate(s) for s in range(1, 51)]
    assert rates[:3] == sorted(rates[:3])
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert min(rates) > 0
