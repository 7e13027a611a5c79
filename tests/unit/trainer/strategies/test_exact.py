"""Gradients as whole numbers: their sum does not depend on the order, and what does not fit is not wrapped around."""

from __future__ import annotations

import pytest
import torch

from trainer.strategies.exact import FRACTION_BITS, LIMIT, fixed_point


def whole(values: torch.Tensor) -> torch.Tensor:
    found = fixed_point(values)
    assert found is not None
    return found


def test_the_sum_is_the_same_in_any_order_where_that_of_floats_is_not() -> None:
    parts = torch.randn(64, 1000, generator=torch.Generator().manual_seed(1))
    forth, back = torch.zeros(1000), torch.zeros(1000)
    for part in parts:
        forth = forth + part
    for part in parts.flip(0):
        back = back + part
    assert not torch.equal(forth, back)
    sums = [sum((whole(p) for p in order), torch.zeros(1000, dtype=torch.int64)) for order in (parts, parts.flip(0))]
    assert torch.equal(sums[0], sums[1])
    torch.testing.assert_close((sums[0].double() * 2.0**-FRACTION_BITS).float(), forth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [LIMIT, -LIMIT, float("inf"), float("nan")])
def test_what_does_not_fit_is_said(value: float) -> None:
    assert fixed_point(torch.tensor([1.0, value])) is None


def test_the_largest_add_up_without_overflow() -> None:
    largest = whole(torch.tensor([LIMIT * 0.999]))
    assert int(largest) * 8192 < 2**63 - 1
    assert fixed_point(torch.zeros(0)) is not None
