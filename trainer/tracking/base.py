"""The interface of trackers. A tracker gets the points of one curve, in order, each once."""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from trainer.errors import InputError, MusterError
from trainer.recipe import Recipe
from trainer.recipe.trackers import TRACKERS
from trainer.run.metrics import EvalMetrics, Metrics, StepMetrics
from trainer.storage import Storage

TRAIN, EVAL = "train", "eval"
_PARTS = (TRAIN, EVAL)
_EVAL_PREFIX = "eval_"
_PLACE = ("step", "total_steps", "time")


class Watermark(NamedTuple):
    """The position of a curve's last point. Within a step, training's values precede those of its evaluation."""

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
        """Returns the values by the names that every tracker shows: ``train/loss``, ``eval/loss``."""
        return {f"{self.part}/{name}": value for name, value in self.values.items()}


@dataclass(frozen=True)
class TrackedRun:
    """The curve that a tracker shows for a run. ``id`` is equal for all attempts of the run; ``fresh``: no point of it
    was sent yet."""

    id: str
    fresh: bool
    recipe: Recipe
    run: Storage


class Tracker(Protocol):
    """One tracker of one curve, made as ``Tracker(curve)`` and used from one thread. Every method may raise any error
    and may be slow: see `Mirror`. ``check(recipe)``, a static method, raises InputError for a mistake that the user has
    to fix before a run starts; it contacts nothing."""

    def last_mark(self) -> Watermark | None:
        """Returns the mark of the last point in the tracker's own records; None where it has none that can be read."""
        ...

    def write(self, points: Sequence[Point]) -> None: ...

    def close(self, state: str) -> None:
        """``state`` is that of the run: succeeded, failed or interrupted."""
        ...


def point_of(metrics: Metrics) -> Point | None:
    """Returns the point of a metrics row; None for a row that is neither a step's nor an evaluation's."""
    if isinstance(metrics, EvalMetrics) and metrics.eval_loss is None and metrics.eval_s is None:
        return None
    part, prefix = (TRAIN, "") if isinstance(metrics, StepMetrics) else (EVAL, _EVAL_PREFIX)
    row = metrics.to_row()
    values = {
        name.removeprefix(prefix): float(value)
        for name, value in row.items()
        if isinstance(value, int | float) and math.isfinite(value) and name not in _PLACE
    }
    total_steps = metrics.total_steps if isinstance(metrics, StepMetrics) else None
    return Point(metrics.step, total_steps or 0, part, metrics.time or time.time(), values)


def check_trackers(recipe: Recipe) -> None:
    """Raises InputError when a tracker of the recipe lacks its library or something of its settings."""
    for name in recipe.tracking:
        row = TRACKERS[name]
        if row.library and importlib.util.find_spec(row.library) is None:
            raise InputError(
                f"tracking names {name}, whose library {row.library} is not installed here: pip install "
                f"{row.package}, or leave it out (tracking=[])"
            )
        try:
            TRACKERS.load(name).check(recipe)
        except MusterError:
            raise
        except (Exception, SystemExit) as error:  # the library is installed and broken
            raise InputError(
                f"tracking names {name}, which cannot be used here: {type(error).__name__}: {error}; fix it, or leave "
                "it out (tracking=[])"
            ) from error
