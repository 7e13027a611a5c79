"""The contract of a task: a run continues in the middle, and every rank may run a micro-batch without units."""

from __future__ import annotations

from collections.abc import Callable

import torch

from trainer.data import Batch
from trainer.recipe import Recipe

from .bench import bench
from .training import adapter_bytes, losses, train_here

Make = Callable[..., Recipe]
"""Returns a recipe of the task, by the name of its run and changes by dotted path."""


def continues_in_the_middle_as_if_it_had_not_stopped(make: Make) -> None:
    whole, halved = make("whole"), make("halved")
    assert train_here(whole) == "succeeded"
    stop = halved.model_copy(update={"training": halved.training.model_copy(update={"stop_after": 6})})
    assert train_here(stop) == "interrupted"
    assert train_here(halved) == "succeeded"
    assert losses(halved) == losses(whole)
    assert adapter_bytes(halved) == adapter_bytes(whole)


def reaches_every_parameter_with_a_micro_batch_of_weight_zero(make: Make) -> None:
    device = torch.device("cpu")
    with bench(make("zero")) as b:
        full = next(b.stream.prefetch(b.stream.start(), 0, 1)).batches[0]
        measured = []
        for batch in (full, Batch.empty()):
            if b.task.prepares_steps and not b.task.generates:
                with torch.no_grad():
                    b.task.prepare_step(b.model, [batch], device)
            measured.append(b.task.loss(b.model, b.task.dummy_batch(batch), device))
        (_, sums), (loss, nothing) = measured
        assert loss.item() == 0.0
        loss.backward()
        assert {n: tuple(v.shape) for n, v in nothing.items()} == {n: tuple(v.shape) for n, v in sums.items()}
        assert not any(v.any() for v in nothing.values())
        for name, parameter in b.strategy.trainable().items():
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name


CHECKS = (
    continues_in_the_middle_as_if_it_had_not_stopped,
    reaches_every_parameter_with_a_micro_batch_of_weight_zero,
)
"""Functions of a `Make`, which raise AssertionError."""
