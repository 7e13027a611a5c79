"""Built models and hand-made micro-batches for the tests of what trains on them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from launcher.testing.models import CPU, base_of, built, logits_of, plain_base_of, stir
from trainer.data import Batch
from trainer.data.loading.collate import collate
from trainer.data.sample import Sample

__all__ = [
    "CPU",
    "SHARED_BLOCKS",
    "SMALL_SHAPE",
    "base_of",
    "built",
    "logits_of",
    "packed",
    "plain_base_of",
    "random_model",
    "samples_of",
    "stir",
]
SMALL_SHAPE: dict[str, Any] = {
    "vocab_size": 384, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
"""Settings of a decoder of the usual form, for `random_model`."""
SHARED_BLOCKS: dict[str, Any] = {
    "layers_block_type": ["mamba", "hybrid", "hybrid", "mamba", "hybrid", "hybrid"], "num_hidden_layers": 6,
    "num_mem_blocks": 2, "adapter_rank": 4, "mamba_d_state": 8, "mamba_headdim": 32, "n_mamba_heads": 2,
}  # fmt: skip
"""Settings of a Zamba 2 whose four hybrid layers share two blocks."""


def packed(lengths: Sequence[Sequence[int]], *, prompt: int = 3, vocabulary: int = 384, seed: int = 0) -> Batch:
    """A micro-batch with one row per pack of samples of these lengths; what follows ``prompt`` tokens is a target."""
    draw = np.random.Generator(np.random.PCG64(seed))
    packs = [
        [Sample(draw.integers(4, vocabulary, n).astype(np.int32), np.arange(n) >= max(1, prompt)) for n in pack]
        for pack in lengths
    ]
    names = [f"0:0/{i}" for i in range(sum(len(pack) for pack in lengths))]
    return collate(0, packs, names)


def samples_of(batch: Batch) -> list[tuple[int, slice]]:
    """(row, columns) of every sample of the micro-batch, pads left out."""
    found = []
    for row, positions in enumerate(batch.position_ids):
        starts = [int(i) for i in np.flatnonzero(positions == 0)]
        for start, end in zip(starts, [*starts[1:], len(positions)], strict=True):
            if end - start > 1:  # a pad is a segment of length one
                found.append((row, slice(start, end)))
    return found


def random_model(config: Any, folder: Path, tokenizer_of: Path) -> Path:
    """Saves an untrained causal language model of 384 tokens in ``folder``, with the tokenizer of the tiny model."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(6)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:  # wider than models begin, so that samples and layers matter
                    parameter.normal_(0, 0.08)
        model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tokenizer_of / name).read_bytes())
    return folder
