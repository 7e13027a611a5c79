"""The parts of a layer that treat each token by itself (the MLP, norms), computed for a tile of tokens at a time.

The intermediate values of such a part are several times as large as its input. Each tile is checkpointed, so that only
the values of one tile are in memory at a time, in the forward as in the backward (Arctic Long Sequence Training,
Bekman et al. 2025, arXiv:2506.13996).

Legend: B rows, L tokens of a row, D hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.utils.checkpoint import checkpoint

from trainer.errors import InputError
from trainer.layers.find import decoder_layers


class Tiles:
    """The size of a tile, in ``tokens``, for all layers of a model."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    @contextmanager
    def of(self, tokens: int) -> Iterator[None]:
        """Inside the context a tile has ``tokens`` tokens."""
        before, self.tokens = self.tokens, tokens
        try:
            yield
        finally:
            self.tokens = before


class TiledForward:
    """The forward of a part of a layer, ``whole``, one tile after the other."""

    def __init__(self, whole: Callable[[torch.Tensor], torch.Tensor], tiles: Tiles) -> None:
        self.whole, self.tiles = whole, tiles

    def __call__(self, x_BLD: torch.Tensor) -> torch.Tensor:
        if x_BLD.shape[-2] <= self.tiles.tokens:
            return self.whole(x_BLD)
        tiles = x_BLD.split(self.tiles.tokens, dim=-2)
        return torch.cat([checkpoint(self._of_tile, tile, use_reentrant=False) for tile in tiles], dim=-2)

    def _of_tile(self, x_BtD: torch.Tensor) -> torch.Tensor:
        return self.whole(x_BtD.contiguous())  # a part of several rows is not; copied here, one tile is in memory


def tile_layers(model: torch.nn.Module, tokens: int) -> Tiles:
    """Makes the parts of each decoder layer that treat a token by itself compute in tiles. Called before the strategy
    wraps the model. Raises InputError if there are none."""
    tiles = Tiles(tokens)
    parts = [part for layer in decoder_layers(model) for part in layer.children() if _by_token(part)]
    if not parts:
        raise InputError(
            f"compute.tile_tokens has no effect on {type(model).__name__}, whose layers have no part that treats each "
            "token by itself; leave it out"
        )
    for part in parts:
        part.forward = TiledForward(part.forward, tiles)
    return tiles


def tiled_parts(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [part for part in model.modules() if isinstance(part.forward, TiledForward)]


def _by_token(part: torch.nn.Module) -> bool:
    """Returns True for an MLP or a norm: its forward takes the tokens' values and nothing else. Attention and recurrent
    layers also take masks, positions or a state. `check_tiles` compares the results."""
    if isinstance(part, torch.nn.Linear) or not any(True for _ in part.parameters()):
        return False  # it keeps its input or nothing
    return len(inspect.signature(part.forward).parameters) == 1
