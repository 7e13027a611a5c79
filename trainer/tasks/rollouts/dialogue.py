"""The edge to the chat template, which decides how an environment's answer stands between two turns of the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Dialogue(Protocol):
    """See `trainer.data.formats.dialogue`. This small, since the prompts of a task are tokens: the conversation before
    them is not known any more."""

    def answer(self, text: str, turn: Sequence[int], *, ended: bool) -> list[int]:
        """Returns the tokens to put after a turn of the model, given by its tokens. ``ended``: its last token is one
        that ends a turn. Raises RewardFailed for a text that cannot be put there."""
