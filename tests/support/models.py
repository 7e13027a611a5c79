"""Built models and hand-made micro-batches for the tests of what trains on them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.adapters import Adapter, make_adapter
from trainer.data import Batch
from trainer.data.loading.collate import collate
from trainer.data.sample import Sample
from trainer.model import Head, build
from trainer.recipe import Recipe

CPU = torch.device("cpu")
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


def built(recipe: Recipe, labels: tuple[str, ...] | None = None) -> tuple[Any, Adapter]:
    """The recipe's base with its adapter attached, in training mode, and the adapter. ``labels``: those of the head of
    a sequence classifier."""
    torch.set_num_threads(1)  # models this small lose time by sharing their work out
    adapter = make_adapter(recipe)
    folder = Path(recipe.model.path)
    checkpointing = recipe.training.gradient_checkpointing
    head = Head(labels, recipe.seed) if labels else None
    base = build(recipe.model, folder, CPU, full=adapter.full, checkpointing=checkpointing, head=head).model
    return adapter.attach(base, lambda: plain_base_of(recipe)).train(), adapter


def base_of(recipe: Recipe) -> Any:
    return build(recipe.model, Path(recipe.model.path), CPU, full=False, checkpointing=False).model


def plain_base_of(recipe: Recipe) -> Any:
    """The base as it lies in its files, whatever the recipe quantises it to."""
    section = recipe.model.model_copy(update={"quantization": "none"})
    return build(section, Path(recipe.model.path), CPU, full=False, checkpointing=False).model


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


def stir(model: torch.nn.Module, scale: float = 0.05) -> None:
    """Moves what is trained away from where it begins, so that an adapter changes what its base says."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape, generator=generator)


def logits_of(model: torch.nn.Module, seed: int = 1, vocabulary: int = 384) -> torch.Tensor:
    """The logits of one fixed text, in evaluation mode."""
    tokens = torch.randint(4, vocabulary, (1, 20), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=tokens, use_cache=False).logits.float()
    return logits


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
