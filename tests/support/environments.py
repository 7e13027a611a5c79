"""Environments of the tests. The processes that they run in import nothing else."""

from __future__ import annotations

import os
import time
from typing import Any


class Asking:
    """Asks on, with the number of the turn and what it remembers of the text, until the third turn."""

    def reset(self, prompt: str, reference: str) -> None:
        self.said = [prompt]

    def step(self, text: str) -> tuple[str | None, float]:
        self.said.append(text)
        more = None if len(self.said) > 3 else f" [{len(self.said)}: {len(''.join(self.said)) % 97}] "
        return more, len(text) % 7 / 10


class Patient(Asking):
    """Never ends a text."""

    def step(self, text: str) -> tuple[str | None, float]:
        return " on ", 1.0


class Silent(Asking):
    """Ends every text at its first turn."""

    def step(self, text: str) -> tuple[str | None, float]:
        return None, len(text) % 7 / 10


class Broken(Asking):
    def step(self, text: str) -> tuple[str | None, float]:
        raise KeyError("tool")


class BrokenOnTheSecondRank(Asking):
    def step(self, text: str) -> tuple[str | None, float]:
        if os.environ["RANK"] == "1" and len(self.said) == 2:
            raise KeyError("tool")
        return super().step(text)


class Hanging(Asking):
    def step(self, text: str) -> tuple[str | None, float]:
        time.sleep(1000)
        return None, 0.0


class Dying(Asking):
    def step(self, text: str) -> tuple[str | None, float]:
        os._exit(3)


class OneNumber(Asking):
    def step(self, text: str) -> Any:
        return 1.0


class NotFinite(Asking):
    def step(self, text: str) -> tuple[str | None, float]:
        return None, float("nan")


class NoSteps:
    def reset(self, prompt: str, reference: str) -> None:
        pass


class Unmade(Asking):
    def __init__(self) -> None:
        raise OSError("no licence")


class Where(Asking):
    """Answers with the process that it lives in, and how many turns it has seen."""

    def step(self, text: str) -> tuple[str | None, float]:
        self.said.append(text)
        return f"{os.getpid()} {self.said[0]} {len(self.said) - 1}", 0.0
