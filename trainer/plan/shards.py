"""The bytes that a rank keeps of a model between steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch

from trainer.errors import InputError
from trainer.layers.find import separate_blocks
from trainer.recipe.strategies import STRATEGIES, Mesh
from trainer.strategies.shards import Weight


def weights_of(model: torch.nn.Module) -> Counter[Weight]:
    """Counts the model's parameters by these properties; tied ones count once. A deep model has few different ones."""
    in_layers: set[int] = set()
    with suppress(InputError):  # without layers
        in_layers = {id(p) for block in separate_blocks(model) for p in block.parameters()}
    return Counter(
        Weight(tuple(p.shape), p.element_size(), p.requires_grad, id(p) in in_layers) for p in model.parameters()
    )


@dataclass(frozen=True)
class Share:
    """Bytes that one rank keeps of a model, on the device or the host. ``padding`` is allocated and never used."""

    frozen: int
    trainable: int
    gradient: int
    optimizer: int
    padding: int


def share(
    kind: str,
    weights: Counter[Weight],
    mesh: Mesh,
    rank: int,
    *,
    gradient_size: int,
    state: Callable[[Weight, int], int],
) -> Share:
    """Sums a rank's bytes. ``gradient_size``: bytes per gradient element; ``state(weight, elements)``: bytes of
    optimizer state for so many elements of a parameter."""
    kept_by = STRATEGIES.load(kind).kept
    sums: Counter[str] = Counter()
    for weight, count in weights.items():
        kept = kept_by(weight, mesh, rank)
        sums["trainable" if weight.trainable else "frozen"] += count * kept.parameter * weight.itemsize
        sums["padding"] += count * kept.padding * weight.itemsize
        if weight.trainable:
            sums["gradient"] += count * kept.gradient * gradient_size
            sums["optimizer"] += count * state(weight, kept.optimizer)
    return Share(sums["frozen"], sums["trainable"], sums["gradient"], sums["optimizer"], sums["padding"])
