"""Losses under a head that is not trained: those of autograd, their gradients, and what is kept for them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import cross_entropy

from trainer.tasks.cross_entropy import NLL, CrossEntropy
from trainer.tasks.frozen_lm_head_loss import frozen_cross_entropy

TARGETS, HIDDEN, VOCABULARY = 11, 6, 40


FORMULAS = {"nll": NLL, "smoothed": CrossEntropy(0.3)}


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
@pytest.mark.parametrize("formula", FORMULAS.values(), ids=FORMULAS)
def test_losses_and_gradients_are_those_of_autograd(
    formula: CrossEntropy, rows: int, dtype: torch.dtype, bound: float
) -> None:
    head, hidden, labels, weights = drawn(dtype)
    want = formula.losses(head(hidden).float(), labels)
    (slope,) = torch.autograd.grad((want * weights).sum(), hidden)
    got = frozen_cross_entropy(head, hidden, labels, rows, formula)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=bound, atol=bound)
    (found,) = torch.autograd.grad((got * weights).sum(), hidden)
    assert found.dtype == dtype
    assert float((found - slope).norm() / slope.norm()) <= bound


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_cross_entropy_is_the_papers(smoothing: float) -> None:
    head, hidden, labels, _ = drawn(torch.float32)
    logits = head(hidden).detach()
    log_p = torch.log(torch.softmax(logits.double(), -1))
    spread = torch.full_like(log_p, smoothing / VOCABULARY)
    spread[torch.arange(TARGETS), labels] += 1 - smoothing
    by_hand = -(spread * log_p).sum(-1)
    formula = CrossEntropy(smoothing)
    torch.testing.assert_close(formula.losses(logits, labels).double(), by_hand, rtol=1e-6, atol=1e-6)
    losses, slopes = formula.with_slopes(logits.clone(), labels)
    torch.testing.assert_close(losses.double(), by_hand, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(slopes.double(), log_p.exp() - spread, rtol=1e-5, atol=1e-6)


def test_logits_of_any_size_are_no_overflow() -> None:
    head, hidden, labels, _ = drawn(torch.float32)
    with torch.no_grad():
        head.weight.mul_(1e4)
    got = frozen_cross_entropy(head, hidden, labels, 4, NLL)
    torch.testing.assert_close(got, cross_entropy(head(hidden), labels, reduction="none"))
    got.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


def test_logits_that_are_masked_out_are_no_loss() -> None:
    logits, labels = torch.zeros(2, 5), torch.tensor([1, 2])
    logits[:, 4] = -torch.inf
    losses, slopes = NLL.with_slopes(logits, labels)
    assert losses.tolist() == pytest.approx([1.386294] * 2)
    assert slopes.isfinite().all()


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
    assert largest_kept(lambda: frozen_cross_entropy(head, hidden, labels, TARGETS, CrossEntropy(0.1))) < logits


def test_no_targets_are_no_loss_and_a_gradient_of_zero() -> None:
    head, hidden, labels, _ = drawn(torch.float32)
    frozen_cross_entropy(head, hidden[:0], labels[:0], 4, CrossEntropy(0.1)).sum().backward()
    assert hidden.grad is not None
    assert not hidden.grad.any()
