"""A training in this process that dies at a chosen call, as by SIGKILL."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.training import train_here
from trainer.recipe import Recipe


class Killed(BaseException):
    """No handler of the program's own takes it for a failure of its own."""


def train_until(recipe: Recipe, owner: Any, name: str, call: int) -> None:
    """Trains until the ``call``-th call of ``owner.name``, which is not done."""
    plain, calls = getattr(owner, name), [0]

    def counted(*given: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            raise Killed
        return plain(*given, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, counted)
        with pytest.raises(Killed):
            train_here(recipe)
