"""Packed samples on the attention kernels that torch has for a GPU: exact, and without a matrix of all scores."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.support.attention import difference, gradient_of, lone_loss, packed_loss, random_llama
from tests.support.device import DEVICE, DevicePeak
from tests.support.models import packed
from tests.support.stepping import full_packs
from trainer.model.kernels.attention import VARLEN, register
from trainer.tasks.lm_head_loss import TargetHead

LENGTHS = [[700, 300, 24], [1000], [512, 256, 200]]
FLOAT32, BFLOAT16 = 1e-4, 3e-2
"""Of the gradient's norm. Samples that see each other move it by tenths (tests/unit shows it); what is left here is the
rounding of sums in another order, in float32 and in bfloat16."""
FUSED = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]


def only(*backends: SDPBackend) -> AbstractContextManager[Any]:
    return sdpa_kernel(list(backends)) if backends else nullcontext()


KERNELS: dict[str, tuple[str, tuple[SDPBackend, ...], torch.dtype, float]] = {
    "chosen-by-torch": ("sdpa", (), torch.bfloat16, BFLOAT16),
    "chosen-by-torch-float32": ("sdpa", (), torch.float32, FLOAT32),
    "efficient": ("sdpa", (SDPBackend.EFFICIENT_ATTENTION,), torch.bfloat16, BFLOAT16),
    "efficient-float32": ("sdpa", (SDPBackend.EFFICIENT_ATTENTION,), torch.float32, FLOAT32),
    "math": ("sdpa", (SDPBackend.MATH,), torch.float32, FLOAT32),
    "varlen": (VARLEN, (), torch.bfloat16, BFLOAT16),
    "flex": ("flex_attention", (), torch.bfloat16, BFLOAT16),
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_pack_trains_like_its_samples_one_by_one(kernel: str) -> None:
    attention, backends, dtype, bound = KERNELS[kernel]
    batch = packed(LENGTHS)
    reference = random_llama(DEVICE, dtype)
    alone = lone_loss(reference, batch, DEVICE)
    want = gradient_of(reference, alone)
    register()
    model = random_llama(DEVICE, dtype, attention)
    with only(*backends):
        together = packed_loss(model, batch, DEVICE)
        got = gradient_of(model, together)
    assert together.item() == pytest.approx(alone.item(), rel=bound)
    assert difference(got, want) <= bound


def test_one_sample_in_a_pack_takes_flash_attention() -> None:
    """Without a mask there is the fastest kernel: torch refuses to run when it is the only one and does not fit."""
    model = random_llama(DEVICE, torch.bfloat16)
    batch = full_packs(2, 1024, vocabulary=384)
    with only(SDPBackend.FLASH_ATTENTION):
        got = gradient_of(model, packed_loss(model, batch, DEVICE))
    with only(SDPBackend.MATH):
        want = gradient_of(model, packed_loss(model, batch, DEVICE))
    assert difference(got, want) <= BFLOAT16


def test_told_where_samples_begin_as_a_task_does() -> None:
    register()
    batch = packed(LENGTHS)
    reference = random_llama(DEVICE, torch.bfloat16)
    want = gradient_of(reference, lone_loss(reference, batch, DEVICE))
    model = random_llama(DEVICE, torch.bfloat16, VARLEN)
    got = gradient_of(model, TargetHead(model).losses(model, batch, DEVICE).sum())
    assert difference(got, want) <= BFLOAT16


@pytest.mark.parametrize(("attention", "backends"), [("sdpa", FUSED), ("flex_attention", []), (VARLEN, [])])
def test_no_matrix_of_all_scores_is_kept(attention: str, backends: list[SDPBackend]) -> None:
    """A fused kernel takes packs, and a step stays below the bytes of one layer's scores."""
    register()
    length, heads = 8192, 16
    model = random_llama(DEVICE, torch.bfloat16, attention, num_hidden_layers=1, num_attention_heads=heads)
    batch = full_packs(1, length, samples=16, vocabulary=384)
    with only(*backends):
        gradient_of(model, packed_loss(model, batch, DEVICE))  # compiles, and makes the gradients' memory
        peak = DevicePeak(DEVICE)
        gradient_of(model, packed_loss(model, batch, DEVICE))
    assert peak.bytes() < heads * length**2 * torch.bfloat16.itemsize
