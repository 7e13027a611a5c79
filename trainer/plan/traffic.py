"""The bytes that each rank sends in one step of training.

Collectives are counted as rings, which send the least (Patarasuk & Yuan 2009, doi:10.1016/j.jpdc.2008.09.002). With S
bytes and n ranks, a gather and a reduction in parts send S (n - 1) / n from each rank, and a reduction to all twice as
much. Libraries may take another algorithm, and overlap most of it with the computation.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from trainer.recipe import Recipe
from trainer.recipe.strategies import Mesh
from trainer.strategies import strategy_class
from trainer.strategies.shards import Weight

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class Traffic(NamedTuple):
    """Bytes that a rank sends per step. ``inside``: to the ranks of its replica; ``across``: to other replicas;
    ``context``: of ``inside``, what the ranks that compute a text together exchange in attention."""

    inside: int
    across: int
    context: int = 0


def traffic(recipe: Recipe, config: PreTrainedConfig, weights: Mapping[Weight, int], ranks: int) -> Traffic:
    """Returns what each rank sends under the recipe's strategy. ``weights``: of the full model, with their counts."""
    mesh, training = Mesh.of(recipe, ranks), recipe.training
    micro_batches = -(-training.global_batch // (training.micro_batch * mesh.data_ranks))
    strategy = strategy_class(recipe)
    sums: Counter[str] = Counter()
    for weight, count in weights.items():
        sent = strategy.sent(weight, mesh, recipe, micro_batches)
        sums["inside"] += count * sent.inside
        sums["across"] += count * sent.across
    context = micro_batches * _exchanged(recipe, config, mesh.context) if mesh.context > 1 else 0
    return Traffic(sums["inside"] + context, sums["across"], context)


def _exchanged(recipe: Recipe, config: PreTrainedConfig, context: int) -> int:
    """Returns the bytes of queries, keys, values and outputs that a rank sends in one micro-batch: in the forward, in
    the backward, and in the second forward of gradient checkpointing. A model without attention heads exchanges
    nothing."""
    import torch

    text = config.get_text_config()
    heads = int(getattr(text, "num_attention_heads", None) or 0)
    if not heads:
        return 0
    groups = math.lcm(int(getattr(text, "num_key_value_heads", None) or heads), context)
    size = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    tokens = recipe.training.micro_batch * -(-recipe.data.sequence_length // context)
    values = tokens * (2 * heads + 2 * groups) * size * int(text.num_hidden_layers)
    passes = 3 if recipe.training.gradient_checkpointing else 2
    width = int(getattr(torch, recipe.model.dtype).itemsize)
    return passes * values * width * (context - 1) // context
