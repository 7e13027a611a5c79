"""The inside of an environment's process: makes an object for each text, and asks it for the answers to its turns."""

from __future__ import annotations

import math
import numbers
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from trainer.errors import RewardFailed
from trainer.tasks.environments.interface import Step
from trainer.tasks.rewards.process import SHOWN, loaded, where

_texts: dict[int, Any] = {}


def check(spec: str) -> str | None:
    """Returns what the class lacks, as the end of a sentence; None if it is complete. A function that makes the objects
    is not called here."""
    made = loaded(spec)
    lacking = [name for name in ("reset", "step") if isinstance(made, type) and not callable(getattr(made, name, None))]
    return f"has no method {' and no method '.join(lacking)}" if lacking else None


def reset(spec: str, texts: Sequence[tuple[int, str, str]]) -> None:
    """Makes an object for each text, given by its number, prompt and reference; all earlier objects are freed. Raises
    RewardFailed."""
    _texts.clear()
    for number, prompt, reference in texts:
        made = _raising(spec, "reset", loaded(spec))
        _raising(spec, "reset", made.reset, prompt, reference)
        _texts[number] = made


def step(spec: str, turns: Sequence[tuple[int, str]]) -> list[Step]:
    """Returns the answers to turns, given by the numbers of their texts. Raises RewardFailed."""
    made = []
    for number, turn in turns:
        if number not in _texts:
            raise RewardFailed(f"the process of {spec} ended between two turns, and its objects with it")
        got = _raising(spec, "step", _texts[number].step, turn)
        made.append(_checked(spec, got))
        if made[-1].answer is None:
            del _texts[number]
    return made


def _raising(spec: str, method: str, call: Callable[..., Any], *given: Any) -> Any:
    try:
        return call(*given)
    except BaseException as error:  # SystemExit too: the environment is not to end the process
        traceback.print_exc()
        place = where(loaded(spec), error)
        raise RewardFailed(f"{spec}.{method} raised {type(error).__name__}: {error} ({place})") from None


def _checked(spec: str, got: Any) -> Step:
    pair = got if isinstance(got, tuple | list) and len(got) == 2 else (0, None)
    answer, reward = pair
    if not (answer is None or isinstance(answer, str)) or not isinstance(reward, numbers.Real):
        raise RewardFailed(
            f"{spec}.step returned {got!r:.{SHOWN}}; it has to return an answer, which is a text or None, and a number"
        )
    if not math.isfinite(reward):
        raise RewardFailed(f"{spec}.step returned the reward {float(reward)}; it has to be finite")
    if answer is not None and not answer.isascii():
        try:
            answer.encode()
        except UnicodeEncodeError as error:
            raise RewardFailed(f"{spec}.step returned a text that cannot be written as UTF-8: {error}") from None
    return Step(answer, float(reward))
