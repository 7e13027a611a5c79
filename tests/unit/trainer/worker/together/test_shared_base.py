"""The products of several adapters, and the joined arguments of a forward."""

from __future__ import annotations

import pytest
import torch

from trainer.tasks.inputs import sample_bounds
from trainer.worker.together.lora_products import LoraProduct, with_products
from trainer.worker.together.shared_base import joined, joined_bounds

SPANS = [(0, 5), (5, 6), (8, 12)]
"""The tokens from 6 to 8 belong to a run without an adapter here."""


def made(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, list[LoraProduct]]:
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    products = [
        LoraProduct(*span, 0.5 + n, drawn(2 + n, 7, dtype=torch.float64), drawn(3, 2 + n, dtype=torch.float64))
        for n, span in enumerate(SPANS)
    ]
    return drawn(2, 6, 3), drawn(2, 6, 7), products


def plain(output: torch.Tensor, x: torch.Tensor, products: list[LoraProduct]) -> torch.Tensor:
    parts, flat, at = [], x.reshape(-1, x.shape[-1]), 0
    for p in products:
        parts += [torch.zeros(p.start - at, 3, dtype=x.dtype), p.scale * flat[p.start : p.stop] @ p.a_rD.T @ p.b_Or.T]
        at = p.stop
    return output + torch.cat(parts).view_as(output)


def test_products_and_their_derivatives_are_those_of_the_formula() -> None:
    output, x, products = made()
    leaves = [output, x, *(m for p in products for m in (p.a_rD, p.b_Or))]
    got, want = with_products(output, x, products), plain(output, x, products)
    torch.testing.assert_close(got, want)
    slope = torch.randn_like(want)
    for mine, theirs in zip(
        torch.autograd.grad(got, leaves, slope), torch.autograd.grad(want, leaves, slope), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_the_derivatives_hold_numerically() -> None:
    output, x, products = made()
    matrices = [m for p in products for m in (p.a_rD, p.b_Or)]

    def of(output: torch.Tensor, x: torch.Tensor, *matrices: torch.Tensor) -> torch.Tensor:
        pairs = zip(products, matrices[::2], matrices[1::2], strict=True)
        return with_products(output, x, [p._replace(a_rD=a, b_Or=b) for p, a, b in pairs])

    assert torch.autograd.gradcheck(of, (output, x, *matrices))


def test_it_computes_in_the_dtype_of_the_layer_and_keeps_that_of_the_adapter() -> None:
    output, x, products = made(torch.bfloat16)
    got = with_products(output, x, products)
    got.sum().backward()
    assert got.dtype == x.grad.dtype == torch.bfloat16  # type: ignore[union-attr]
    assert products[0].a_rD.grad is not None
    assert products[0].a_rD.grad.dtype == torch.float64


def test_an_input_without_a_gradient_gets_none() -> None:
    output, x, products = made()
    got = with_products(output, x.detach(), products)
    (slope,) = torch.autograd.grad(got.sum(), [products[0].b_Or])
    assert slope.any()


def rows(*positions: list[int]) -> torch.Tensor:
    return torch.tensor(positions)


@pytest.mark.parametrize("name", ["cu_seq_lens_q", "sample_bounds"])
def test_joined_rows_have_the_samples_of_all_and_the_pads_apart(name: str) -> None:
    first, second = rows([0, 1, 0, 1, 2], [0, 1, 2, 3, 0]), rows([0, 1, 0])
    inputs = []
    for positions in (first, second):
        bounds = torch.from_numpy(sample_bounds(positions.numpy()))
        longest = int(bounds.diff().max())
        made = (bounds, longest)
        extra = {"sample_bounds": made} if name == "sample_bounds" else {name: bounds, "max_length_q": longest}
        inputs.append({"input_ids": positions + 7, "position_ids": positions, "use_cache": False, **extra})
    got = joined(inputs)
    assert got["input_ids"].tolist() == [[7, 8, 7, 8, 9], [7, 8, 9, 10, 7], [7, 8, 7, 0, 0]]
    assert got["position_ids"].tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 3, 0], [0, 1, 0, 0, 0]]
    bounds, longest = got[name] if name == "sample_bounds" else (got[name], got["max_length_q"])
    assert (bounds.tolist(), longest) == ([0, 2, 5, 9, 10, 12, 13, 15], 4)
    assert bounds.dtype == torch.int32


def test_long_padding_is_the_longest_sample() -> None:
    wide = torch.Size([1, 9]), torch.tensor([0, 4, 9], dtype=torch.int32), 5
    narrow = torch.Size([1, 2]), torch.tensor([0, 2], dtype=torch.int32), 2
    bounds, longest = joined_bounds([wide, narrow])
    assert (bounds.tolist(), longest) == ([0, 4, 9, 11, 18], 7)
