"""The bytes that a teacher of its own takes on each rank (`task: distill`). Its logits are part of the activations.

Under a strategy that shards anything, the teacher is sharded as by FSDP2. Its forward has no backward, so that it holds
the layer that computes, the next one, which is gathered ahead, and the root with embeddings and head. Its activations,
which are freed layer by layer, are left out.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from trainer.layers.find import separate_blocks
from trainer.model.meta import from_config
from trainer.plan.fake_quantized_linear import packed_sizes, stand_in
from trainer.plan.meta_model import quiet
from trainer.plan.shards import share, weights_of
from trainer.recipe import ModelSection, Recipe
from trainer.recipe.strategies import Mesh
from trainer.strategies.shards import Weight, chunk_rows

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

AHEAD = 2
"""Layers that are gathered at a time."""


class TeacherBytes(NamedTuple):
    """``kept``: between forward passes, ``on_host`` of them in the host's memory; ``gathered``: in a forward, besides;
    ``load``: of the host's memory while it is loaded."""

    kept: int = 0
    on_host: int = 0
    gathered: int = 0
    load: int = 0


@dataclass(frozen=True)
class TeacherModel:
    """A teacher's sizes. ``layer``: bytes of its largest layer; ``root``: of what is in no layer; ``scales``: of its
    quantisation, which every rank keeps."""

    elements: int
    weights: Counter[Weight]
    layer: int
    root: int
    scales: int

    @classmethod
    def of(cls, section: ModelSection, config: PreTrainedConfig) -> TeacherModel:
        """Raises InputError when no such causal language model can be built."""
        import torch

        with quiet():
            model = from_config(section, config, full=False, checkpointing=False)
            if section.quantization != "none":
                stand_in(model, getattr(torch, section.dtype))
        packed, weights = list(packed_sizes(model)), weights_of(model)
        hidden = sum(size.elements - size.stored for size in packed)
        layers = [sum(p.numel() * p.element_size() for p in block.parameters()) for block in separate_blocks(model)]
        total = sum(w.numel * w.itemsize * count for w, count in weights.items())
        elements = sum(w.numel * count for w, count in weights.items()) + hidden
        return cls(elements, weights, max(layers), total - sum(layers), sum(size.state_bytes for size in packed))

    def bytes(self, recipe: Recipe, ranks: int, rank: int, load_budget: int) -> TeacherBytes:
        """Returns a rank's bytes under the recipe's strategy. ``load_budget``: what a sharded load takes besides."""
        row, mesh = recipe.strategy.row, Mesh.of(recipe, ranks)
        kind = "fsdp" if row.sharded else "ddp"
        mine = share(kind, self.weights, mesh, rank, gradient_size=0, state=lambda weight, elements: 0)
        kept = mine.frozen + mine.padding + self.scales
        if not row.sharded:
            return TeacherBytes(kept, load=kept)
        on_host = kept - self.scales if recipe.strategy.offload else 0
        return TeacherBytes(kept, on_host, AHEAD * self.layer + self.root, kept + load_budget)

    def sent(self, recipe: Recipe, ranks: int) -> int:
        """Returns the bytes that each rank sends in a step to gather the teacher for its forward passes."""
        mesh, training = Mesh.of(recipe, ranks), recipe.training
        if not recipe.strategy.row.sharded:
            return 0
        chunks = {
            weight: chunk_rows(weight.shape[0], mesh.ranks_per_replica, 0) * math.prod(weight.shape[1:])
            for weight in self.weights
        }
        micro_batches = -(-training.global_batch // (training.micro_batch * mesh.data_ranks))
        size = sum(chunks[weight] * weight.itemsize * count for weight, count in self.weights.items())
        return micro_batches * (mesh.ranks_per_replica - 1) * size
