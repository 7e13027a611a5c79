"""The decoder layers of a model: found, compiled, computed in tiles, with their inputs on the device or on its host."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from trainer.layers.compiling import compile_layers
from trainer.layers.offloading import PinnedCopies, keep_layer_inputs
from trainer.layers.tiling import Tiles, tile_layers

if TYPE_CHECKING:
    from trainer.recipe.sections.compute import ComputeSection

__all__ = ["Tiles", "change_layers"]


def change_layers(model: torch.nn.Module, compute: ComputeSection, device: torch.device) -> Tiles | None:
    """Makes the layers compute as the recipe asks. Called before the strategy wraps the model. Raises InputError if one
    of the wishes does not fit the model."""
    tiles = tile_layers(model, compute.tile_tokens) if compute.tile_tokens else None
    if compute.offload_activations and device.type != "cpu":
        keep_layer_inputs(model, PinnedCopies(device))
    if compute.compile:
        compile_layers(model, device)
    return tiles
