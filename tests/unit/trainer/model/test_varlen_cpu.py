"""Attention on CPUs, one sample after the other: the same numbers as under the mask."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from trainer.model.kernels.varlen_cpu import by_sample

HEADS, GROUPS, WIDTH = 4, 2, 8


def under_a_mask(
    q_THD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor, begins: list[int], window: tuple[int, int]
) -> torch.Tensor:
    """The definition, on all pairs of tokens."""
    at = torch.arange(len(q_THD))
    sample = torch.bucketize(at, torch.tensor(begins[1:]), right=True)
    ahead = at[None] - at[:, None]
    left, right = (len(at) if reach < 0 else reach for reach in window)
    seen = (sample[None] == sample[:, None]) & (ahead <= right) & (ahead >= -left)
    k, v = (t.repeat_interleave(HEADS // GROUPS, 1) for t in (k_TGD, v_TGD))
    scores = torch.einsum("qhd,khd->hqk", q_THD, k) / math.sqrt(q_THD.shape[-1])
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -math.inf).softmax(-1), v)


def drawn(tokens: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(tokens)
    shapes = [(tokens, HEADS, WIDTH), (tokens, GROUPS, WIDTH), (tokens, GROUPS, WIDTH)]
    return [torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("window", [(-1, 0), (-1, -1), (3, 0), (0, 0), (2, 2), (-1, 1)])
@pytest.mark.parametrize("lengths", [[7, 5], [12], [1, 6, 1, 1, 1, 4, 1], [1] * 9, [2, 1]])
def test_values_and_gradients_are_those_under_the_mask(lengths: list[int], window: tuple[int, int]) -> None:
    begins = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    inputs, twins = drawn(begins[-1]), drawn(begins[-1])
    got = by_sample(*inputs, torch.tensor(begins, dtype=torch.int32), window, None)
    want = under_a_mask(*twins, begins, window)
    assert torch.allclose(got, want, atol=1e-12)
    weights = torch.arange(got.numel(), dtype=got.dtype).reshape(got.shape).cos()
    (got * weights).sum().backward()
    (want * weights).sum().backward()
    for mine, theirs in zip(inputs, twins, strict=True):
        assert mine.grad is not None
        assert torch.allclose(mine.grad, theirs.grad, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_sample_is_what_it_would_be_alone_to_the_last_bit(dtype: torch.dtype) -> None:
    lengths = [9, 1, 14, 6]
    begins = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    q, k, v = (t.detach() for t in drawn(begins[-1], dtype))
    together = by_sample(q, k, v, torch.tensor(begins), (-1, 0), None)
    for start, stop in pairwise(begins):
        alone = by_sample(q[start:stop], k[start:stop], v[start:stop], torch.tensor([0, stop - start]), (-1, 0), None)
        assert torch.equal(together[start:stop], alone)


def test_values_may_have_another_width_and_scores_another_scale() -> None:
    q, k, v = drawn(9)
    narrow = v[..., :3]
    got = by_sample(q, k, narrow, torch.tensor([0, 4, 9]), (-1, 0), 0.5)
    want = under_a_mask(q * 0.5 * math.sqrt(WIDTH), k, narrow, [0, 4, 9], (-1, 0))
    assert got.shape == (9, HEADS, 3)
    assert torch.allclose(got, want, atol=1e-12)


def test_dropout_leaves_out_its_share_also_of_a_single_token() -> None:
    torch.manual_seed(3)
    tokens = 400
    q, k = torch.zeros(tokens, HEADS, WIDTH), torch.zeros(tokens, GROUPS, WIDTH)
    alone = by_sample(q, k, torch.ones(tokens, GROUPS, WIDTH), torch.arange(tokens + 1), (-1, 0), None, 0.25)
    assert torch.equal(alone.unique(), torch.tensor([0.0, 1 / 0.75]))
    assert float((alone == 0).float().mean()) == pytest.approx(0.25, abs=0.05)
