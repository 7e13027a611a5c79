"""Packs against their samples one by one: what attention kernels and masks have to get right."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import cross_entropy

from tests.support.models import samples_of
from trainer.data import Batch


def random_llama(device: torch.device, dtype: torch.dtype, attention: str = "sdpa", **changes: Any) -> Any:
    """A Llama of two layers with grouped heads, in training mode. ``attention``: transformers' name of it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 8}
    settings |= {"num_key_value_heads": 4, "vocab_size": 384, "max_position_embeddings": 16384, **changes}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**settings))
    model.set_attn_implementation(attention)
    return model.to(device, dtype).train()


def packed_loss(model: Any, batch: Batch, device: torch.device) -> torch.Tensor:
    """The sum over the targets of all samples, each pack in one row."""
    ids, positions, targets = (
        torch.from_numpy(a).to(device) for a in (batch.input_ids, batch.position_ids, batch.targets)
    )
    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    return cross_entropy(logits[:, :-1][targets[:, 1:]].float(), ids[targets], reduction="sum")


def lone_loss(model: Any, batch: Batch, device: torch.device) -> torch.Tensor:
    """The same with every sample in a forward of its own."""
    total = torch.zeros((), device=device)
    for row, columns in samples_of(batch):
        ids = torch.from_numpy(batch.input_ids[row, columns]).to(device)
        targets = torch.from_numpy(batch.targets[row, columns]).to(device)
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        total = total + cross_entropy(logits[:-1][targets[1:]].float(), ids[targets], reduction="sum")
    return total


def gradient_of(model: Any, loss: torch.Tensor) -> torch.Tensor:
    """Of all parameters, as one float32 vector."""
    model.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    return torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])


def difference(got: torch.Tensor, want: torch.Tensor) -> float:
    """The norm of the difference over the norm of ``want``."""
    return float((got - want).norm() / want.norm())
