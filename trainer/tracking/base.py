"""What a tracker is given and what it does: points of one curve, in order, each once."""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from trainer.errors import InputError, MusterError
from trainer.recipe import Recipe
from trainer.registry import TRACKERS
from trainer.storage import Storage

TRAIN, EVAL = "train", "eval"
_PARTS = (TRAIN, EVAL)
_EVAL_PREFIX = "eval_"
_PLACE = ("step", "total_steps", "time")
EXTRAS = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow", "prometheus": "prometheus_client"}
"""The library behind each tracker; `pip install 'muster[<tracker>]'` brings it."""


class Watermark(NamedTuple):
    """How far a curve has come: of a step, the training's values come before those of its evaluation."""

    step: int
    part: int

    @staticmethod
    def of(step: int, part: str) -> Watermark:
        return Watermark(step, _PARTS.index(part))


START = Watermark(0, 0)


@dataclass(frozen=True)
class Point:
    """The finite numbers of one row of the metrics, under the row's names without ``eval_``; ``time`` is unix s."""

    step: int
    total_steps: int
    part: str
    time: float
    values: Mapping[str, float]

    @property
    def mark(self) -> Watermark:
        return Watermark.of(self.step, self.part)

    def named(self) -> dict[str, float]:
        """``train/loss`` or ``eval/loss``, as every tracker shows them."""
        return {f"{self.part}/{name}": value for name, value in self.values.items()}


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker shows of a run. ``id`` stays the same for all its attempts; ``fresh``: nothing of it was told
    yet."""

    id: str
    fresh: bool
    recipe: Recipe
    run: Storage


class Tracker(Protocol):
    """One tracker of one curve, made as ``Tracker(curve)`` and used from one thread. Any of these may raise anything,
    and take its time: see `Mirror`. ``check(recipe)``, a static method, raises InputError for what a user has to mend
    before a run starts; it contacts nothing."""

    def told(self) -> Watermark | None:
        """How far the curve has come by the tracker's own records; None where it keeps none that can be asked."""
        ...

    def tell(self, points: Sequence[Point]) -> None: ...

    def close(self, state: str) -> None:
        """``state`` is that of the run: succeeded, failed or interrupted."""
        ...


def point_of(row: Mapping[str, Any]) -> Point | None:
    """None for a row that is neither a step's nor an evaluation's."""
    part = TRAIN if "loss" in row else EVAL if "eval_loss" in row else None
    if part is None or "step" not in row:
        return None
    values = {
        name.removeprefix(_EVAL_PREFIX) if part == EVAL else name: float(value)
        for name, value in row.items()
        if isinstance(value, int | float) and math.isfinite(value) and name not in _PLACE
    }
    when = float(row.get("time") or time.time())
    return Point(int(row["step"]), int(row.get("total_steps") or 0), part, when, values)


def check_trackers(recipe: Recipe) -> None:
    """Raises InputError when a tracker of the recipe lacks its library or something of its settings."""
    for name in recipe.tracking:
        if importlib.util.find_spec(EXTRAS.get(name, "json")) is None:
            raise InputError(
                f"tracking names {name}, whose library {EXTRAS[name]} is not installed here: pip install "
                f"'muster[{name}]', or leave it out (tracking=[])"
            )
        try:
            TRACKERS.load(name).check(recipe)
        except MusterError:
            raise
        except (Exception, SystemExit) as error:  # of a library that is there and broken
            raise InputError(
                f"tracking names {name}, which cannot be used here: {type(error).__name__}: {error}; mend it, or leave "
                "it out (tracking=[])"
            ) from error
