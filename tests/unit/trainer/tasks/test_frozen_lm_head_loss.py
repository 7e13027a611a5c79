"""Losses under a head that is not trained: those of cross entropy, their gradients, and what is kept for them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import cross_entropy

from trainer.tasks.frozen_lm_head_loss import frozen_nll

TARGETS, HIDDEN, VOCABULARY = 11, 6, 40


def drawn(dtype: torch.dtype) -> tuple[torch.nn.Linear, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A head, hidden states, labels, and a weight for each row's loss."""
    draw = torch.Generator().manual_seed(1)
    head = torch.nn.Linear(HIDDEN, VOCABULARY, bias=True, dtype=dtype).requires_grad_(False)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
    hidden = torch.randn(TARGETS, HIDDEN, generator=draw).to(dtype).requires_grad_()
    labels = torch.randint(VOCABULARY, (TARGETS,), generator=draw)
    return head, hidden, labels, torch.randn(TARGETS, generator=draw)


@pytest.mark.parametrize("rows", [1, 4, 11, 100])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_losses_and_gradients_are_those_of_cross_entropy(rows: int, dtype: torch.dtype, bound: float) -> None:
    head, hidden, labels, weights = drawn(dtype)
    want = cross_entropy(head(hidden).float(), labels, reduction="none")
    (slope,) = torch.autograd.grad((want * weights).sum(), hidden)
    got = frozen_nll(head, hidden, labels, rows)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=bound, atol=bound)
    (found,) = torch.autograd.grad((got * weights).sum(), hidden)
    assert found.dtype == dtype
    assert float((found - slope).norm() / slope.norm()) <= bound


def test_logits_of_any_size_are_no_overflow() -> None:
    head, hidden, labels, _ = drawn(torch.float32)
    with torch.no_grad():
        head.weight.mul_(1e4)
    got = frozen_nll(head, hidden, labels, 4)
    torch.testing.assert_close(got, cross_entropy(head(hidden), labels, reduction="none"))
    got.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


def test_no_logits_are_kept() -> None:
    head, hidden, labels, _ = drawn(torch.float32)

    def largest_kept(losses: Callable[[], torch.Tensor]) -> int:
        kept: list[int] = []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            losses().sum().backward()
        return max(kept)

    logits = TARGETS * VOCABULARY
    assert logits > HIDDEN * VOCABULARY, "the head's weight is kept"
    assert largest_kept(lambda: cross_entropy(head(hidden), labels, reduction="none")) >= logits
    assert largest_kept(lambda: frozen_nll(head, hidden, labels, TARGETS)) < logits


def test_no_targets_are_no_loss_and_a_gradient_of_zero() -> None:
    head, hidden, labels, _ = drawn(torch.float32)
    frozen_nll(head, hidden[:0], labels[:0], 4).sum().backward()
    assert hidden.grad is not None
    assert not hidden.grad.any()
