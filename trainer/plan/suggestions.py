"""What to change when a run does not fit: the smallest change first, each planned anew, so that it is known to fit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from trainer.errors import InputError, RecipeError
from trainer.plan.memory import Planner
from trainer.plan.result import Plan
from trainer.recipe import Recipe, dump, loads
from trainer.recipe.zero import STAGES

MOST_RANKS = 64

Change = tuple[str, ...]
"""``KEY=VALUE`` overrides of a recipe."""


class Suggestion(NamedTuple):
    """Overrides that make the recipe fit, and the plan with them."""

    overrides: Change
    plan: Plan


def suggestions(planner: Planner, recipe: Recipe, ranks: int) -> list[Suggestion]:
    """Of every kind of change, the least that fits alone; when none does, the shortest way through several of them.
    Empty when nothing helps."""
    advisor = _Advisor(planner, recipe, ranks)
    alone = [found for kind in _kinds(recipe, ranks) if (found := advisor.least(kind, ()))]
    return alone or advisor.together()


class _Advisor:
    def __init__(self, planner: Planner, recipe: Recipe, ranks: int) -> None:
        self.planner, self.recipe, self.ranks = planner, recipe, ranks
        self.text = dump(recipe)

    def changed(self, change: Change) -> tuple[Recipe, int] | None:
        """None where the recipe refuses the change."""
        try:
            recipe = loads(self.text, overrides=change)
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
        return next((found for change in kind if (found := self.fitting(before + change))), None)

    def together(self) -> list[Suggestion]:
        """Takes every kind in turn to its end until it fits, then leaves out what was not needed."""
        taken: list[Change] = []
        for kind in _kinds(self.recipe, self.ranks):
            so_far = _flat(taken)
            found = self.least(kind, so_far)
            if found:
                taken.append(found.overrides[len(so_far) :])
                return [self._needed(taken, found)]
            if self.changed(so_far + kind[-1]) is not None:
                taken.append(kind[-1])
        return []

    def _needed(self, taken: list[Change], found: Suggestion) -> Suggestion:
        for change in list(taken[:-1]):
            fewer = [c for c in taken if c is not change]
            if without := self.fitting(_flat(fewer)):
                taken, found = fewer, without
        return found


def _flat(changes: list[Change]) -> Change:
    return tuple(override for change in changes for override in change)


def _kinds(recipe: Recipe, ranks: int) -> Iterator[list[Change]]:
    """Changes by kind, the smallest kind first, and inside a kind the smallest step."""
    found: list[list[Change]] = [
        _micro_batches(recipe.training.micro_batch),
        [] if recipe.training.gradient_checkpointing else [("training.gradient_checkpointing=true",)],
        list(_strategies(recipe, ranks)),
        list(_offloads(recipe)),
        [("model.quantization=nf4",)] if recipe.model.quantization != "nf4" else [],
        [(f"resources.workers={n}", *_sharding(recipe)) for n in _more(ranks)],
    ]
    yield from (kind for kind in found if kind)


def _micro_batches(now: int) -> list[Change]:
    smaller: list[Change] = []
    while now > 1:
        now //= 2
        smaller.append((f"training.micro_batch={now}",))
    return smaller


def _strategies(recipe: Recipe, ranks: int) -> Iterator[Change]:
    if recipe.strategy.kind == "fsdp" and not recipe.strategy.reshard_after_forward:
        yield ("strategy.reshard_after_forward=true",)
    if ranks > 1 and (change := _sharding(recipe)):
        yield change


def _sharding(recipe: Recipe) -> Change:
    """What makes more ranks hold less each; nothing where they do already."""
    kind = recipe.strategy.kind
    if kind in ("fsdp", "zero3"):
        return ()
    return ("strategy.kind=fsdp", *(("strategy.deepspeed=null",) if kind in STAGES else ()))


def _offloads(recipe: Recipe) -> Iterator[Change]:
    """From `strategy.kind` as it may have become by then: what does not go together, the recipe refuses."""
    if recipe.strategy.kind in STAGES:
        yield (f"strategy.deepspeed={recipe.strategy.kind}_offload",)
    elif not recipe.strategy.offload:
        yield ("strategy.kind=fsdp", "strategy.offload=true")[recipe.strategy.kind == "fsdp" :]


def _more(ranks: int) -> Iterator[int]:
    while ranks * 2 <= MOST_RANKS:
        ranks *= 2
        yield ranks
