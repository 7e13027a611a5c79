"""Rewards and scores of texts, computed by a Python function that the recipe names and that is imported from the
working folder."""

from __future__ import annotations

import importlib
import importlib.util
import math
import numbers
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.errors import InputError, RewardFailed

Function = Callable[..., Any]
REWARD = "ppo.reward.function"
SHOWN = 200


class Scorer:
    """Calls the function that ``setting`` of the recipe names, and checks its result."""

    def __init__(self, spec: str, setting: str = REWARD) -> None:
        self.spec, self._function = spec, load(spec, setting)

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], references: Sequence[str]) -> list[float]:
        """Returns a number for each completion. Raises RewardFailed, which is not retried."""
        if not completions:
            return []
        try:
            got = self._function(prompts=list(prompts), completions=list(completions), references=list(references))
        except Exception as error:
            *_, (frame, line) = traceback.walk_tb(error.__traceback__)
            where = f"line {line} of {frame.f_code.co_filename}"
            raise RewardFailed(f"{self.spec} raised {type(error).__name__}: {error} ({where})") from error
        return self._checked(got, completions)

    def _checked(self, got: Any, completions: Sequence[str]) -> list[float]:
        values = got.tolist() if hasattr(got, "tolist") else got
        if not isinstance(values, list | tuple):
            raise RewardFailed(f"{self.spec} returned {type(got).__name__}; it has to return a list of numbers")
        if len(values) != len(completions):
            raise RewardFailed(f"{self.spec} returned {len(values)} numbers for {len(completions)} texts")
        for value, text in zip(values, completions, strict=True):
            if not isinstance(value, numbers.Real) or not math.isfinite(value):
                raise RewardFailed(f"{self.spec} returned {value!r} for the text {text[:SHOWN]!r}; it has to be finite")
        return [float(value) for value in values]


def load(spec: str, setting: str = REWARD) -> Function:
    """Returns the function that ``spec`` names. Raises InputError if it cannot be loaded."""
    place, _, name = spec.rpartition(":")
    try:
        with _working_folder():
            module = _from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:
        raise InputError(
            f"{setting} {spec!r} cannot be loaded from {Path.cwd()}: {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError(f"{setting} {spec!r}: {place} has no function {name!r}")
    found: Function = function
    return found


@contextmanager
def _working_folder() -> Any:
    sys.path.insert(0, str(Path.cwd()))
    try:
        yield
    finally:
        sys.path.remove(str(Path.cwd()))


def _from_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"muster_reward_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
