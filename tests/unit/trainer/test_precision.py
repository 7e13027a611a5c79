"""Sixteen bits without autocast: the same losses and gradients as with it, and only where it is not needed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.models import CPU, built, packed, stir
from tests.support.training import losses, small_recipe, train_here, write_pairs
from trainer.precision import InDtypeOfInput, needs_autocast
from trainer.recipe import Recipe
from trainer.tasks import make_task

Make = Callable[..., Recipe]
BF16 = {"model.dtype": "bfloat16"}


@pytest.fixture
def make(tiny_model: Path, tmp_path: Path) -> Make:
    return lambda **changes: small_recipe("precision", tiny_model, tmp_path, **changes)


def as_peft_has_it(model: Any) -> None:
    for layer in model.modules():
        if isinstance(layer, InDtypeOfInput):
            layer.__class__ = torch.nn.Linear
        if hasattr(layer, "cast_input_dtype_enabled"):
            layer.cast_input_dtype_enabled = True


def gradients(model: Any, task: Any, dtype: torch.dtype | None) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and its gradients; ``dtype``: under autocast."""
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", dtype) if dtype else nullcontext():
        loss = task.loss_sum(model, packed([[20, 9], [16]]), CPU)
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("changes", [{}, {"model.quantization": "nf4"}, {"adapter.method": "rslora"}])
def test_gradients_are_those_under_autocast_to_the_last_bit(make: Make, dtype: str, changes: dict[str, Any]) -> None:
    recipe = make(**{"model.dtype": dtype, "adapter.dropout": 0.0, **changes})
    model, _ = built(recipe)
    stir(model)
    task = make_task(recipe)
    task.attach(model)
    assert not needs_autocast(model.train(), getattr(torch, dtype))
    loss, got = gradients(model, task, None)
    as_peft_has_it(model)
    assert needs_autocast(model, getattr(torch, dtype))
    loss_before, want = gradients(model, task, getattr(torch, dtype))
    assert loss == loss_before
    assert got.keys() == want.keys()
    assert {g.dtype for g in got.values()} == {torch.float32}
    for name in want:
        assert torch.equal(got[name], want[name]), name
        assert want[name].any(), name


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter.method": "dora"},
        {"adapter.method": "none"},
        {"adapter.method": "vera"},
        {"adapter.modules_to_save": ["lm_head"]},
        {"adapter.trainable_tokens": [3]},
        {"model.quantization": "int8"},
    ],
)
def test_whatever_else_is_trained_in_float32_keeps_autocast(make: Make, changes: dict[str, Any]) -> None:
    model, _ = built(make(**BF16, **changes))
    assert needs_autocast(model, torch.bfloat16)


def test_a_run_in_bfloat16_learns_what_one_in_float32_does(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pairs(tmp_path / "data" / "a.jsonl", 40)

    def no_autocast(*given: Any, **named: Any) -> Any:
        raise AssertionError("autocast")

    plain = make(**{"data.eval": [], "training.eval_every": None})
    fine = plain.model_copy(update={"name": "fine"})
    assert train_here(fine) == "succeeded"
    monkeypatch.setattr(torch, "autocast", no_autocast)
    rough = plain.model_copy(update={"name": "rough", "model": plain.model.model_copy(update={"dtype": "bfloat16"})})
    assert train_here(rough) == "succeeded"
    assert losses(rough) == pytest.approx(losses(fine), rel=0.02)
