"""A user at a terminal, who types commands, reads what they show, and copies from it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from tests.support.terminal import COLUMNS, SILENT_S, Terminal

ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07]*\x07|.)")
LIBRARIES = re.compile(
    r"Traceback \(most recent|^\s*File \".*\", line \d|\b\w*Warning\b:|site-packages|dist-packages"
    r"|\b(?:DEBUG|INFO|WARNING|ERROR|CRITICAL)\b|^[IWEF]\d{4} |^\d{4}-\d\d-\d\d[ T]\d\d:|\[rank\d|^\(\w.*pid=\d+"
    r"|raylet|core_worker|huggingface\.co|it/s\]|An error happened",
    re.MULTILINE,
)
"""What libraries write to a terminal: stacks, warnings, lines of loggers, progress bars, and their own sentences."""
PHASE = re.compile(r"\[ *\d+\.\d s\] ")


class Step(NamedTuple):
    command: str
    code: int
    seconds: float


@dataclass
class User:
    """``tell`` gets the lines of the terminal, those of a command when it has ended. ``steps``: the commands so far."""

    terminal: Terminal
    tell: Callable[[str], None]
    steps: list[Step] = field(default_factory=list)

    def does(self, command: str, *expected: str, fits: bool = False, silent_s: float = SILENT_S) -> None:
        """Types a command that succeeds and shows the expected texts. ``fits``: no line is wider than the terminal."""
        began = self._types(command)
        self._ends(command, began, 0, silent_s)
        self._shows(*expected)
        if fits:
            assert [line for line in self.terminal.copied() if len(line) > COLUMNS] == []

    def errs(self, command: str, *sentences: str) -> None:
        """Types a command that is a mistake: exit code 2, and beside its phases one line for each sentence alone."""
        began = self._types(command)
        self._ends(command, began, 2)
        lines = [line for line in self.terminal.copied()[1:-1] if not PHASE.match(line)]
        assert len(lines) == len(sentences), lines
        for line, sentence in zip(lines, sentences, strict=True):
            assert sentence in line

    def interrupts(self, command: str, at: str, *expected: str) -> None:
        """Types a command, and Ctrl-C when it shows what the pattern ``at`` matches: exit code 3."""
        began = self._types(command)
        self.terminal.wait_for(at)
        self.terminal.press_ctrl("c")
        self._ends(command, began, 3)
        self._shows(*expected)

    def talks(self, command: str, question: str) -> None:
        """Types a command that talks, asks a question and leaves. The answer ends where an answer should."""
        began = self._types(command)
        for line in (question, "exit"):
            self.terminal.wait_for(r"\n> ")
            self.terminal.enter(line)
        self._ends(command, began, 0)
        lines = self.terminal.copied()
        answer = "\n".join(lines[lines.index(f"> {question}") + 1 : lines.index("> exit")])
        assert re.fullmatch(r"\w.*\w\.", answer), answer

    def copies(self, pattern: str) -> str:
        """The text in the lines of the last command that the pattern matches."""
        return next(match[0] for line in self.terminal.copied() if (match := re.search(pattern, line)))

    def _types(self, command: str) -> float:
        self.terminal.type(command)
        return time.monotonic()

    def _ends(self, command: str, began: float, code: int, silent_s: float = SILENT_S) -> None:
        step = Step(command, self.terminal.ended(silent_s), time.monotonic() - began)
        self.steps.append(step)
        for line in self.terminal.shown()[:-1]:  # without the next prompt
            self.tell(line)
        self.tell(f"{f' exit {step.code}, {step.seconds:.1f} s':─>{COLUMNS}}")
        assert step.code == code
        assert (found := LIBRARIES.search(plain_text(self.terminal.sent))) is None, found
        # The next prompt stands alone in its line: the command has ended the last line of its own.
        assert self.terminal.shown()[-1] == "$"

    def _shows(self, *expected: str) -> None:
        text = "\n".join(self.terminal.copied()[1:])
        for part in expected:
            assert part in text, f"not shown: {part}"


def plain_text(sent: str) -> str:
    """What was sent, without escape sequences and with each state of a line that was drawn again as a line."""
    return ESCAPES.sub("", sent).replace("\r", "\n")
