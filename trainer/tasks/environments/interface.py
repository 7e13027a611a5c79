"""The interface of an environment, for the code of a user: it imports neither torch nor anything else of muster."""

from __future__ import annotations

from typing import NamedTuple, Protocol


class Step(NamedTuple):
    """``answer``: what stands after the model's turn, None if the text ends there. ``reward``: of the turn; that of the
    text is the sum over its turns."""

    answer: str | None
    reward: float = 0.0


class TextEnvironment(Protocol):
    """Answers the turns of one text. The recipe names its class, which is called without arguments for each text; an
    object stays in its process, and is freed after its text.

    The same turns must get the same answers: a run that is continued writes the texts of its step again, and is exact
    only if they are the same."""

    def reset(self, prompt: str, reference: str) -> None:
        """Is called once, before the first turn. ``reference``: the answer in the data."""

    def step(self, text: str) -> tuple[str | None, float]:
        """Returns the answer to a turn of the model and its reward, as a `Step` or a plain pair. ``text``: the turn
        without the `stop` string that ended it. The last turn of a text may be cut off; its answer is not used."""
