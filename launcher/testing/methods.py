"""The contract of an adapter method: values that do not depend on the rank, and files that plain peft loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trainer.adapters import verify_saved
from trainer.recipe import Recipe

from .bench import bench
from .models import base_of, built, logits_of, stir

Make = Callable[..., Recipe]
"""Returns a recipe of the method, by changes by dotted path."""
STEPS = 8


def begins_with_the_same_values_on_every_rank(make: Make, folder: Path) -> None:
    torch.manual_seed(1)
    one, _ = built(make())
    torch.manual_seed(2)
    two, _ = built(make())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def learns_and_continues_in_the_middle_as_if_it_had_not_stopped(make: Make, folder: Path) -> None:
    """The state is stored after half of the steps, and loaded from its files by new objects."""
    half = folder / "half"
    half.mkdir()

    def store(position: Any, last: bool) -> None:
        if position.step == STEPS // 2:
            snapshot = whole.state.snapshot(position.step, {}, final=False)
            assert snapshot is not None
            whole.state.write(snapshot, half)
            middle.append((position, snapshot.state))

    middle: list[tuple[Any, Any]] = []
    recipe = make(**{"checkpoint.every_steps": STEPS // 2, "training.steps": STEPS})
    with bench(recipe) as whole:
        whole.run(checkpoint=store)
        losses = whole.losses()
        end = {n: p.detach().clone() for n, p in whole.strategy.trainable().items()}
    assert sum(losses[-2:]) < sum(losses[:2]), losses
    position, state = middle[0]
    with bench(recipe) as resumed:
        resumed.state.load(half, state)
        resumed.run(position)
        assert resumed.losses() == losses[STEPS // 2 :]
        for name, parameter in resumed.strategy.trainable().items():
            assert torch.equal(parameter, end[name]), name


def is_loaded_by_plain_peft(make: Make, folder: Path) -> None:
    """Only where it is saved as peft's files."""
    recipe = make()
    model, adapter = built(recipe)
    stir(model)
    save(model, adapter, folder)
    if (folder / "adapter_config.json").is_file():
        torch.testing.assert_close(logits_of(reloaded(base_of(recipe), folder)), logits_of(model), rtol=0, atol=1e-4)


def save(model: Any, adapter: Any, folder: Path) -> None:
    """Saves an adapter, and verifies its files."""
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    adapter.save(model, weights, folder)
    verify_saved(adapter, adapter.saved_shapes(model, lambda p: tuple(p.shape)), folder)


def reloaded(base: Any, folder: Path) -> Any:
    """Returns the model that peft itself makes of a base model and the files."""
    from peft import PeftModel

    return PeftModel.from_pretrained(base, str(folder))


CHECKS = (
    begins_with_the_same_values_on_every_rank,
    learns_and_continues_in_the_middle_as_if_it_had_not_stopped,
    is_loaded_by_plain_peft,
)
"""Functions of a `Make` and an empty folder, which raise AssertionError."""
