"""Suggests changes to a recipe that does not fit: the smallest first, each planned again to verify that it fits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from trainer.errors import InputError, RecipeError
from trainer.plan.memory import Planner
from trainer.plan.result import Plan
from trainer.recipe import Recipe, dump, loads

MOST_RANKS = 64
TILE = 4096
"""Tokens that keep a GPU busy."""

Change = tuple[str, ...]
"""``KEY=VALUE`` overrides of a recipe."""
CHECKPOINTING: Change = ("training.gradient_checkpointing=true",)


class Suggestion(NamedTuple):
    """Overrides that make the recipe fit, and its plan with them."""

    overrides: Change
    plan: Plan


def suggestions(planner: Planner, recipe: Recipe, ranks: int) -> list[Suggestion]:
    """Returns the smallest change of each kind that is enough alone; if none is, one suggestion that combines several.

    Empty when nothing helps."""
    advisor = _Advisor(planner, recipe, ranks)
    alone = [found for kind in advisor.kinds() if (found := advisor.least(kind, ()))]
    return alone or advisor.together()


class _Advisor:
    def __init__(self, planner: Planner, recipe: Recipe, ranks: int) -> None:
        self.planner, self.recipe, self.ranks = planner, recipe, ranks
        self.text = dump(recipe)

    def kinds(self) -> Iterator[list[Change]]:
        heads = getattr(self.planner.config.get_text_config(), "num_attention_heads", None) or 1
        return _kinds(self.recipe, self.ranks, int(heads))

    def changed(self, change: Change) -> tuple[Recipe, int] | None:
        """Returns the recipe and its number of ranks, None when the change is not valid."""
        try:
            recipe = loads(self.text, overrides=change, imports=False)
        except RecipeError:
            return None
        ranks = recipe.resources.min_workers if any(c.startswith("resources.workers=") for c in change) else self.ranks
        return recipe, ranks

    def fitting(self, change: Change) -> Suggestion | None:
        changed = self.changed(change)
        if changed is None or not self.planner.may_fit(*changed):
            return None
        try:
            plan = self.planner.plan(*changed)
        except InputError:
            return None
        return Suggestion(change, plan) if plan.fits else None

    def least(self, kind: list[Change], before: Change) -> Suggestion | None:
        """Returns the first change that fits. Each one saves more than those before it, so that most are not planned:
        a plan takes seconds."""
        valid = [before + change for change in kind if self.changed(before + change) is not None]
        found = self.fitting(valid[-1]) if valid else None
        if found is None:
            return None
        low, high = 0, len(valid) - 1  # the one at `high` fits
        while low < high:
            middle = (low + high) // 2
            if smaller := self.fitting(valid[middle]):
                found, high = smaller, middle
            else:
                low = middle + 1
        return found

    def together(self) -> list[Suggestion]:
        """Adds the largest change of each kind in turn until the recipe fits, then drops the changes that are not
        needed."""
        taken: list[Change] = []
        for kind in self.kinds():
            so_far = _flat(taken)
            found = self.least(kind, so_far)
            if found:
                taken.append(found.overrides[len(so_far) :])
                for change in list(taken[:-1]):
                    fewer = [c for c in taken if c is not change]
                    if without := self.fitting(_flat(fewer)):
                        taken, found = fewer, without
                return [found]
            if self.changed(so_far + kind[-1]) is not None:
                taken.append(kind[-1])
        return []


def _flat(changes: list[Change]) -> Change:
    return tuple(override for change in changes for override in change)


def _kinds(recipe: Recipe, ranks: int, heads: int) -> Iterator[list[Change]]:
    """Yields the changes by kind: the kind with the least effect first, and in each kind the smallest change first."""
    micro_batch = recipe.training.micro_batch
    context, common = recipe.strategy.context_parallel, math.gcd(ranks, heads)
    doubled = (ranks << n for n in range(1, MOST_RANKS.bit_length()))
    found: list[list[Change]] = [
        [(f"training.micro_batch={micro_batch >> n}",) for n in range(1, micro_batch.bit_length())],
        [] if recipe.training.gradient_checkpointing else [CHECKPOINTING],
        list(_tiles(recipe)),
        list(_offloaded_activations(recipe)),
        # Groups of ranks that divide a text: each takes a micro-batch together, so that its exchange is paid for in
        # every layer.
        [(f"strategy.context_parallel={n}",) for n in range(context + 1, common + 1) if common % n == 0],
        list(_strategies(recipe, ranks)),
        list(_offloads(recipe)),
        [("model.quantization=nf4",)] if recipe.model.quantization != "nf4" else [],
        [(f"resources.workers={workers}", *_sharding(recipe)) for workers in doubled if workers <= MOST_RANKS],
    ]
    yield from (kind for kind in found if kind)


def _tiles(recipe: Recipe) -> Iterator[Change]:
    """Yields tiles, which cost a second computation of the MLP; then also the inputs of layers in the host's memory."""
    if recipe.compute.tile_tokens or recipe.data.sequence_length <= TILE:
        return
    checkpointing = () if recipe.training.gradient_checkpointing else CHECKPOINTING
    tiles = (*checkpointing, f"compute.tile_tokens={TILE}")
    yield tiles
    yield from ((*tiles, change[-1]) for change in _offloaded_activations(recipe))


def _offloaded_activations(recipe: Recipe) -> Iterator[Change]:
    if recipe.resources.gpus_per_worker and not recipe.compute.offload_activations:
        checkpointing = () if recipe.training.gradient_checkpointing else CHECKPOINTING
        yield (*checkpointing, "compute.offload_activations=true")


def _strategies(recipe: Recipe, ranks: int) -> Iterator[Change]:
    if not recipe.strategy.reshard_after_forward:
        yield ("strategy.reshard_after_forward=true",)
    if ranks > 1 and (change := _sharding(recipe)):
        yield change


def _sharding(recipe: Recipe) -> Change:
    """Returns the overrides that shard the model over the ranks; empty if it is sharded already."""
    row = recipe.strategy.row
    if row.shards == "parameters":
        return ()
    return ("strategy.kind=fsdp", *(("strategy.deepspeed=null",) if row.zero_stage else ()))


def _offloads(recipe: Recipe) -> Iterator[Change]:
    # An earlier change may have set another strategy.kind: `_Advisor.changed` drops combinations that are not valid.
    if recipe.strategy.row.zero_stage:
        yield (f"strategy.deepspeed={recipe.strategy.kind}_offload",)
    elif not recipe.strategy.offload:
        yield ("strategy.kind=fsdp", "strategy.offload=true")[recipe.strategy.kind == "fsdp" :]
