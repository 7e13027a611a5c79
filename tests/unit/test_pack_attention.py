"""Attention sample by sample: the same numbers as under the mask, and only where the mask says just that."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tests.support.attention import difference, gradient_of, packed_loss, random_llama
from tests.support.stepping import full_packs
from trainer.data import Batch
from trainer.model import pack_attention
from trainer.model.pack_attention import PackAttention, install, spans_of

CPU = torch.device("cpu")


@pytest.fixture
def installed() -> Iterator[None]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    install()
    yield
    AttentionInterface.register("sdpa", before)


def block_mask(*packs: list[int]) -> torch.Tensor:
    rows = []
    for lengths in packs:
        sample = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        rows.append((sample[:, None] == sample) & torch.ones(len(sample), len(sample), dtype=torch.bool).tril())
    return torch.stack(rows)[:, None]


def padded(batch: Batch, pads: int) -> Batch:
    for array in (batch.input_ids, batch.position_ids, batch.targets):
        array[-1, -pads:] = 0
    return batch


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_is_that_under_the_mask(
    checkpointing: bool, installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_llama(CPU, torch.float32)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batch = padded(full_packs(2, 96, samples=6, vocabulary=384), 7)
    calls: list[int] = []
    by_span = pack_attention.by_span
    monkeypatch.setattr(pack_attention, "by_span", lambda *given: calls.append(1) or by_span(*given))
    loss = packed_loss(model, batch, CPU)
    got = gradient_of(model, loss)
    assert len(calls) == 2 * (1 + checkpointing)  # the layers, and once more each
    monkeypatch.setattr(pack_attention, "spans_of", lambda mask: None)
    expected = packed_loss(model, batch, CPU)
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    assert difference(got, gradient_of(model, expected)) < 1e-5


def test_a_batch_of_pads_alone_keeps_every_gradient(installed: None) -> None:
    model = random_llama(CPU, torch.float32)
    empty = Batch.empty()
    ids, positions = torch.from_numpy(empty.input_ids), torch.from_numpy(empty.position_ids)
    model(input_ids=ids, position_ids=positions, use_cache=False).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_spans_are_read_off_the_mask() -> None:
    assert spans_of(block_mask([3, 2, 4], [5, 1, 1, 2])) == [[3, 2, 4], [5, -2, 2]]
    assert spans_of(block_mask([4, 4], [8])) == [[4, 4], [8]]


def test_any_pack_comes_back_as_it_was() -> None:
    rng = np.random.default_rng(3)
    for _ in range(40):
        lengths = [int(n) for n in rng.integers(2, 9, 5)]
        assert spans_of(block_mask(lengths)) == [lengths]


@pytest.mark.parametrize("change", ["window", "ahead", "pad", "back", "blind"])
def test_any_other_mask_is_left_to_transformers(change: str) -> None:
    mask = block_mask([6, 5, 4])
    places = torch.arange(15)
    if change == "window":
        mask &= places > places[:, None] - 4
    elif change == "ahead":
        mask[0, 0, 1, 2] = True
    elif change == "pad":
        mask[..., 8] = False
    elif change == "back":
        mask[0, 0, 8, 5] = True
    else:
        mask[0, 0, 3] = False
    assert spans_of(mask) is None


def test_a_window_wider_than_every_sample_changes_nothing() -> None:
    places = torch.arange(15)
    assert spans_of(block_mask([6, 5, 4]) & (places > places[:, None] - 6)) == [[6, 5, 4]]


def test_one_sample_pads_alone_and_additive_masks_gain_nothing() -> None:
    assert spans_of(block_mask([8])) is None
    assert spans_of(block_mask([1] * 8)) is None
    assert spans_of(block_mask([4, 4]).float()) is None


def test_installing_twice_wraps_once(installed: None) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    install()
    now = ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert isinstance(now, PackAttention)
    assert not isinstance(now.own, PackAttention)
