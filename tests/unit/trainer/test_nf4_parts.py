"""Quantising the parts of a weight by themselves gives, to the bit, what bitsandbytes makes of the whole."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer import nf4

CPU = torch.device("cpu")
STORAGES = [torch.uint8, torch.bfloat16, torch.float32]


def weight_of(rows: int, columns: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """With blocks of zeros, and values over many magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * torch.logspace(-6, 2, rows)[:, None]
    weight.view(-1)[: min(64, weight.numel())] = 0
    return weight.to(dtype)


def whole(weight: torch.Tensor, storage: torch.dtype) -> tuple[torch.Tensor, Any]:
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4", quant_storage=storage)
    return packed.view(-1), state


def by_parts(weight: torch.Tensor, storage: torch.dtype, ranks: int, chunk: int) -> tuple[torch.Tensor, Any]:
    """What ``ranks`` ranks would keep, one after the other, each with as many storage elements as FSDP2 gives it."""
    flat, size = weight.view(-1), weight.numel() // 2 // storage.itemsize
    per_rank = math.ceil(size / ranks)
    kept, absmax = [], torch.zeros(math.ceil(weight.numel() / nf4.BLOCK))
    for rank in range(ranks):
        start, stop = min(size, rank * per_rank), min(size, (rank + 1) * per_rank)
        local = torch.empty(stop - start, dtype=storage)
        found = nf4.quantise_piece(lambda a, b: flat[a:b], weight.numel(), start, stop, local, CPU, chunk)
        absmax = torch.maximum(absmax, found)
        kept.append(local)
    return torch.cat(kept), nf4.nested_state(absmax, weight.shape, weight.dtype)


def assert_same_state(got: Any, want: Any) -> None:
    for a, b in ((got, want), (got.state2, want.state2)):
        assert torch.equal(a.absmax, b.absmax)
        assert torch.equal(a.code, b.code)
        assert (a.blocksize, a.quant_type, a.shape, a.dtype) == (b.blocksize, b.quant_type, b.shape, b.dtype)
    assert torch.equal(got.offset, want.offset)


@settings(max_examples=60)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 30).map(lambda n: 8 * n),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    storage=st.sampled_from(STORAGES),
    ranks=st.integers(1, 4),
    chunk=st.integers(1, 20).map(lambda n: 64 * n),
    seed=st.integers(0, 10),
)
def test_parts_are_the_whole(
    rows: int, columns: int, dtype: torch.dtype, storage: torch.dtype, ranks: int, chunk: int, seed: int
) -> None:
    weight = weight_of(rows, columns, dtype, seed)
    packed, state = by_parts(weight, storage, ranks, chunk)
    want_packed, want_state = whole(weight, storage)
    assert packed.dtype == want_packed.dtype
    assert torch.equal(packed.view(torch.uint8), want_packed.view(torch.uint8))
    assert_same_state(state, want_state)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_block_on_a_border_is_quantised_by_both_sides(ranks: int) -> None:
    weight = weight_of(7, 104, torch.bfloat16, 3)
    size = weight.numel() // 2 // 2
    borders = {min(size, r * math.ceil(size / ranks)) * 4 % nf4.BLOCK for r in range(1, ranks)}
    assert borders != {0}, "the case that halos are for"
    packed, _ = by_parts(weight, torch.bfloat16, ranks, nf4.CHUNK)
    assert torch.equal(packed.view(torch.uint8), whole(weight, torch.bfloat16)[0].view(torch.uint8))


@settings(max_examples=60)
@given(st.integers(0, 5000), st.integers(0, 5000), st.integers(1, 5000), st.integers(1, 9).map(lambda n: 64 * n))
def test_chunks_cover_whole_blocks_once(first: int, length: int, numel: int, chunk: int) -> None:
    first, last = min(first, numel), min(first + length, numel)
    chunks = list(nf4.block_chunks(first, last, numel, chunk))
    if first == last:
        assert chunks == []
        return
    assert chunks[0][0] <= first < chunks[0][0] + nf4.BLOCK
    assert last <= chunks[-1][1] <= min(numel, last + nf4.BLOCK - 1)
    assert all(a[1] == b[0] for a, b in itertools.pairwise(chunks))
    assert all(a % nf4.BLOCK == 0 and 0 < b - a <= chunk for a, b in chunks)


@pytest.mark.parametrize("columns", [64, 128, 72])
def test_rows_are_dequantised_as_among_all(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitsandbytes import functional

    monkeypatch.setattr(nf4, "CHUNK", 3 * columns)
    weight = weight_of(16, columns, torch.bfloat16, 1)
    packed, state = functional.quantize_4bit(
        weight, compress_statistics=True, quant_type="nf4", quant_storage=torch.bfloat16
    )
    want = functional.dequantize_4bit(packed, state)
    for first, last in ((0, 16), (5, 6), (3, 11)):
        assert torch.equal(torch.cat(list(nf4.dequantise_rows(packed, state, first, last))), want[first:last])
    assert [len(part) for part in nf4.dequantise_rows(packed, state, 4, 4)] in ([], [0])
