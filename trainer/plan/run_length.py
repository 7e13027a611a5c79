"""How long a run is, where its data are prepared, and how fast it was before, where it ran: each if the storage answers
soon. A plan never waits for them, and never fails for lack of them."""

from __future__ import annotations

import logging
import statistics
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeVar

from trainer.data.run_data import find_prepared, total_steps, try_open_data
from trainer.model import fetch_model, load_tokenizer
from trainer.plan.patience import Asked, Late
from trainer.recipe import Recipe
from trainer.run import layout
from trainer.run.jsonl import rows_backwards
from trainer.storage import open_storage

log = logging.getLogger(__name__)
T = TypeVar("T")

ANSWER_S = 2.0
ROWS = 50


@dataclass(frozen=True)
class RunLength:
    """None is what is not known. ``tokens_per_s`` is that of all ranks together; ``measured``: by the run itself, on
    ``measured_ranks``."""

    steps: int | None = None
    steps_per_epoch: int | None = None
    samples_per_epoch: int | None = None
    tokens_per_s: float | None = None
    measured_ranks: int | None = None

    def hours(self, tokens_per_step: int) -> float | None:
        if self.steps is None or not self.tokens_per_s:
            return None
        return self.steps * tokens_per_step / self.tokens_per_s / 3600


class RunLengthQuery:
    """Asks when it is made, and tells later: what a plan computes meanwhile takes longer than most answers."""

    def __init__(self, recipe: Recipe, tokens_per_s: float | None) -> None:
        """``tokens_per_s``: what the user expects, instead of what the run's own metrics say."""
        self._given = RunLength(steps=recipe.training.steps, tokens_per_s=tokens_per_s)
        self._length = Asked(lambda: _length(recipe))
        self._speed = Asked(lambda: _speed(recipe)) if tokens_per_s is None else None

    def outlook(self) -> RunLength:
        outlook, length = self._given, _answer(self._length)
        if length is not None:
            outlook = replace(outlook, steps=length[0], steps_per_epoch=length[1], samples_per_epoch=length[2])
        if self._speed and (speed := _answer(self._speed)) is not None:
            outlook = replace(outlook, tokens_per_s=speed[0], measured_ranks=speed[1])
        return outlook


def _answer(asked: Asked[T | None]) -> T | None:
    try:
        return asked.answer(ANSWER_S)
    except Late:
        return None
    except Exception as error:  # whatever a storage may raise: what it would have told is optional
        log.debug("left out of the plan: %s", error)
        return None


def _length(recipe: Recipe) -> tuple[int, int, int] | None:
    """Steps of the run and of an epoch, and samples, of data that are prepared."""
    storage = open_storage(recipe.storage, deadline_s=ANSWER_S)
    shared = storage.child(layout.PREPARED)
    begun = try_open_data(recipe, storage.child(recipe.name), shared)
    train = begun.train if begun else find_prepared(recipe, shared, _tokenizer(recipe))
    if train is None:
        return None
    epoch = recipe.training.model_copy(update={"steps": None, "epochs": 1})
    per_epoch = total_steps(recipe.model_copy(update={"training": epoch}), train)
    return total_steps(recipe, train), per_epoch, train.totals.samples


def _tokenizer(recipe: Recipe) -> Any:
    files = fetch_model(recipe.model, weights=False)
    return load_tokenizer(files.folder, trust_remote_code=recipe.model.trust_remote_code)


def _speed(recipe: Recipe) -> tuple[float, int] | None:
    """The median over the run's last steps, and its ranks then."""
    storage = open_storage(recipe.storage, deadline_s=ANSWER_S)
    rows = rows_backwards(storage.child(recipe.name), layout.METRICS)
    steps = [row for row in islice(rows, ROWS) if row.get("tokens_per_s") and row.get("world_size")]
    if not steps:
        return None
    return statistics.median(row["tokens_per_s"] for row in steps), int(steps[0]["world_size"])
