"""Learning-rate schedules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from trainer.optim import learning_rate
from trainer.recipe import ScheduleSection
from trainer.recipe.optimizers import SCHEDULES

FALLS = [name for name, row in SCHEDULES.items() if "min_lr_ratio" in row.settings]

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
    ({"name": "cosine", "cycles": 2}, [1.0, 0.853553, 0.5, 0.146447, 1.0, 0.853553, 0.5, 0.146447]),
    ({"name": "wsd", "decay_ratio": 0.5}, [1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]),
    ({"name": "wsd", "warmup_steps": 2, "decay_ratio": 0.5}, [0.5, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]),
    ({"name": "wsd", "decay_ratio": 0.5, "decay_shape": "sqrt"}, [1.0] * 5 + [0.5, 0.292893, 0.133975]),
    ({"name": "wsd", "decay_ratio": 0.5, "decay_shape": "cosine"}, [1.0] * 5 + [0.853553, 0.5, 0.146447]),
    ({"name": "polynomial", "power": 2.0}, [1.0, 0.765625, 0.5625, 0.390625, 0.25, 0.140625, 0.0625, 0.015625]),
    ({"name": "inverse_sqrt", "warmup_steps": 4}, [0.25, 0.5, 0.75, 1.0, 1.0, 0.894427, 0.816497, 0.755929]),
]


@pytest.mark.parametrize(("settings", "rates"), RATES)
def test_learning_rates(settings: dict[str, Any], rates: list[float]) -> None:
    schedule = ScheduleSection(**settings)
    assert [learning_rate(schedule, 3e-4, s, 8) / 3e-4 for s in range(1, 9)] == pytest.approx(rates, abs=1e-6)


@pytest.mark.parametrize("name", FALLS)
def test_the_step_after_the_last_one_reaches_the_end_and_stays(name: str) -> None:
    schedule = ScheduleSection(name=name, warmup_steps=2, min_lr_ratio=0.1)
    for s in (9, 10, 1000):
        assert learning_rate(schedule, 2.0, s, 8) == pytest.approx(0.2)


@pytest.mark.parametrize("name", [*FALLS, "inverse_sqrt"])
def test_a_rate_never_rises_after_the_warm_up_and_is_never_zero_in_a_run(name: str) -> None:
    rate: Callable[[int], float] = lambda s: learning_rate(ScheduleSection(name=name, warmup_steps=3), 1.0, s, 50)  # noqa: E731
    rates = [rate(s) for s in range(1, 51)]
    assert rates[:3] == sorted(rates[:3])
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert min(rates) > 0


STEPS = 40
KINDS: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({"name": "constant"}, "constant_with_warmup", {}),
    ({"name": "linear"}, "linear", {}),
    ({"name": "cosine"}, "cosine", {}),
    ({"name": "cosine", "min_lr_ratio": 0.1}, "cosine_with_min_lr", {"min_lr_rate": 0.1}),
    ({"name": "cosine", "cycles": 3}, "cosine_with_restarts", {"num_cycles": 3}),
    ({"name": "polynomial", "power": 2.5, "min_lr_ratio": 0.1}, "polynomial", {"power": 2.5, "lr_end": 3e-5}),
    ({"name": "inverse_sqrt"}, "inverse_sqrt", {}),
    *(
        ({"name": "wsd", "decay_ratio": 0.25, "decay_shape": ours, "min_lr_ratio": 0.1}, "warmup_stable_decay",
         {"num_decay_steps": 10, "decay_type": theirs, "min_lr_ratio": 0.1})
        for ours, theirs in (("linear", "linear"), ("cosine", "cosine"), ("sqrt", "1-sqrt"))
    ),
]  # fmt: skip


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize(("settings", "theirs", "more"), KINDS)
def test_the_rates_after_the_warm_up_are_those_of_transformers(
    settings: dict[str, Any], theirs: str, more: dict[str, Any], warmup: int
) -> None:
    """Before its end ours are one step ahead: the first step has a rate above zero."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=3e-4)
    schedule = transformers.get_scheduler(theirs, optimizer, warmup, STEPS, scheduler_specific_kwargs=more)
    section = ScheduleSection(warmup_steps=warmup, **settings)
    for step in range(1, STEPS + 1):
        if step > warmup:
            assert learning_rate(section, 3e-4, step, STEPS) == pytest.approx(schedule.get_last_lr()[0], abs=1e-15)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"cycles": 2}, "cycles has no effect with schedule.name constant; leave it out, or choose cosine"),
        ({"name": "inverse_sqrt", "min_lr_ratio": 0.1}, "choose linear or cosine or wsd or polynomial"),
        ({"name": "linear", "power": 2.0}, "choose polynomial"),
        ({"name": "cosine", "decay_ratio": 0.2}, "choose wsd"),
    ],
)
def test_a_setting_without_effect_is_refused(settings: dict[str, Any], words: str) -> None:
    [conflict] = ScheduleSection(**settings).conflicts()
    assert words in f"{conflict.paths[0][0]} {conflict.message}"
