"""The loss from chunks of logits against cross entropy on all of them, for a vocabulary of 128 k: values and memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.support.device import DEVICE, DevicePeak
from tests.support.stepping import full_packs
from trainer.data import Batch
from trainer.tasks.lm_head_loss import CHUNK_LOGITS, TargetHead

VOCABULARY, HIDDEN = 128256, 1024
CHUNK_BYTES = 16
"""Per logit of a chunk, at most: it and its gradient in bfloat16, and in float32 it and its part of the sum."""


class Embedded(torch.nn.Module):
    """A language model without layers: embeddings, a trained scale, an output head."""

    def __init__(self, dtype: torch.dtype) -> None:
        from transformers import LlamaConfig

        super().__init__()
        self.config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=HIDDEN)
        made = {"device": DEVICE, "dtype": dtype}
        torch.manual_seed(0)
        self.embeddings = torch.nn.Embedding(VOCABULARY, HIDDEN, **made).requires_grad_(False)
        self.head = torch.nn.Linear(HIDDEN, VOCABULARY, bias=False, **made).requires_grad_(False)
        self.scale = torch.nn.Parameter(torch.ones(HIDDEN, **made))

    def get_output_embeddings(self) -> torch.nn.Linear:
        return self.head

    def forward(self, input_ids: torch.Tensor, **unused: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.embeddings(input_ids) * self.scale))


def whole_loss(model: Embedded, batch: Batch) -> torch.Tensor:
    ids, targets = torch.from_numpy(batch.input_ids).to(DEVICE), torch.from_numpy(batch.targets).to(DEVICE)
    logits = model(ids).logits[:, :-1][targets[:, 1:]]
    return cross_entropy(logits.float(), ids[targets], reduction="sum")


def chunked_loss(model: Embedded, batch: Batch) -> torch.Tensor:
    return TargetHead(model).losses(model, batch, DEVICE).sum()


def gradient(model: Embedded, loss: torch.Tensor) -> torch.Tensor:
    (found,) = torch.autograd.grad(loss, [model.scale])
    return found.float()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_chunks_give_the_loss_and_the_gradient_of_the_whole(dtype: torch.dtype, bound: float) -> None:
    batch = full_packs(2, 384, vocabulary=VOCABULARY)
    assert batch.target_tokens > 2 * CHUNK_LOGITS // VOCABULARY, "several chunks"
    model = Embedded(dtype)
    whole = whole_loss(model, batch)
    want = gradient(model, whole)
    chunked = chunked_loss(model, batch)
    got = gradient(model, chunked)
    assert chunked.item() == pytest.approx(whole.item(), rel=bound)
    assert float((got - want).norm() / want.norm()) <= bound


def test_memory_is_that_of_a_chunk_however_many_targets_there_are() -> None:
    batch = full_packs(2, 2048, vocabulary=VOCABULARY)
    model = Embedded(torch.bfloat16)
    peak = DevicePeak(DEVICE)
    gradient(model, whole_loss(model, batch))
    whole = peak.bytes()
    peak.restart()
    gradient(model, chunked_loss(model, batch))
    chunked = peak.bytes()
    activations = 8 * batch.input_ids.size * HIDDEN * torch.bfloat16.itemsize
    assert chunked <= CHUNK_BYTES * CHUNK_LOGITS + activations
    assert whole > 4 * chunked
