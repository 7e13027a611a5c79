"""The critic of PPO: a linear layer on the policy's last hidden states, trained with the adapter."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

VALUE_HEAD = "value_head"
INITIAL_STD = 0.02


def add_value_head(model: Any, seed: int) -> torch.nn.Module:
    """Adds the layer to the model, from the hidden size to 1, in float32. On the meta device it has no values yet;
    `first_value` returns them."""
    output = model.get_output_embeddings().weight
    linear: Any = torch.nn.Linear
    # skip_init: Linear's own initial values would advance the global random number generator.
    head = torch.nn.utils.skip_init(linear, output.shape[-1], 1, device=output.device, dtype=torch.float32)
    for name, parameter in head.named_parameters():
        if not parameter.is_meta:
            parameter.data.copy_(first_value(name, parameter.shape, seed))
    model.add_module(VALUE_HEAD, head)
    made: torch.nn.Module = head
    return made


def first_value(name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    """Returns the initial value of a parameter of the value head, drawn from (seed, name) only: N(0, 0.02²), or 0 for
    the bias."""
    if name.endswith("bias"):
        return torch.zeros(shape)
    digest = hashlib.sha256(f"{seed}:{VALUE_HEAD}.{name.rpartition('.')[2]}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.empty(shape, dtype=torch.float32).normal_(0.0, INITIAL_STD, generator=generator)
