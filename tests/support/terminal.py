"""A shell in a terminal of 80 columns and 24 lines: commands are typed into it, and what it shows is read."""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pexpect
import pyte

from tests.support.waiting import IdleClock

COLUMNS, LINES = 80, 24
LONGEST = 1000
SILENT_S = 120.0
"""How long a command may show nothing new, in seconds of a machine without other load."""
PS1 = r"\[\e]0;exit $?\a\]$ "
PROMPT = re.compile(r"\x1b\]0;exit (\d+)\x07\$ ")
"""The shell's prompt. It sets the window's title, which is not on the screen, to the exit code of the last command."""


class Scrolled(pyte.Screen):
    """A screen that keeps the lines that have left it."""

    def __init__(self, columns: int) -> None:
        self.left: list[str] = []
        super().__init__(columns, LINES)

    def index(self) -> None:
        if self.cursor.y == self.lines - 1:
            self.left.append(self.display[0])
        super().index()

    def all(self) -> list[str]:
        """Every line, down to that of the cursor."""
        return [line.rstrip() for line in (*self.left, *self.display[: self.cursor.y + 1])]


def _default_signals() -> None:
    """Lets Ctrl-C end programs, also where the tests run in the background of a shell, which ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """``sent``: all that was sent to the terminal since the last command was typed, escape sequences included."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.sent = ""
        # A line that continues at the edge is copied as one line, as the wider screen has it.
        self._narrow, self._wide = Scrolled(COLUMNS), Scrolled(LONGEST)
        self._streams = pyte.Stream(self._narrow), pyte.Stream(self._wide)
        self._first = 0, 0
        self._shell = pexpect.spawn(
            "bash",
            ["--norc", "--noprofile"],
            cwd=str(folder),
            env={**environment, "PS1": PS1, "TERM": "xterm-256color"},
            dimensions=(LINES, COLUMNS),
            encoding="utf-8",
            codec_errors="replace",
            preexec_fn=_default_signals,
        )
        self._shell.delaybeforesend = None
        self._shell.logfile_read = self
        self.ended()

    def write(self, text: str) -> None:
        """Shows what pexpect has read of the shell."""
        self.sent += text
        for stream in self._streams:
            stream.feed(text)

    def flush(self) -> None:
        """Does nothing: pexpect calls it after `write`."""

    def type(self, command: str) -> None:
        """Types a command at the shell's prompt; what is shown begins with its line."""
        self._first, self.sent = (len(self._narrow.all()) - 1, len(self._wide.all()) - 1), ""
        self.enter(command)

    def enter(self, line: str) -> None:
        self._shell.sendline(line)

    def press_ctrl(self, key: str) -> None:
        self._shell.sendcontrol(key)

    def wait_for(self, pattern: str | re.Pattern[str], silent_s: float = SILENT_S) -> re.Match[str]:
        """Waits until the pattern is in what is sent from now on; fails if the terminal shows nothing new for
        ``silent_s`` seconds before."""
        clock, seen = IdleClock(), len(self.sent)
        while self._shell.expect([pattern, pexpect.TIMEOUT], timeout=1) == 1:
            if len(self.sent) != seen:
                clock, seen = IdleClock(), len(self.sent)
            assert clock.seconds() < silent_s, "\n".join([*self.shown(), f"{pattern}: nothing new for {silent_s:g} s"])
        found: Any = self._shell.match
        return found  # type: ignore[no-any-return]

    def ended(self, silent_s: float = SILENT_S) -> int:
        """Waits for the end of the command; returns its exit code."""
        return int(self.wait_for(PROMPT, silent_s)[1])

    def shown(self) -> list[str]:
        """The last command and what it has shown, as the terminal's lines."""
        return self._narrow.all()[self._first[0] :]

    def copied(self) -> list[str]:
        """The same, as the lines that one would copy."""
        return self._wide.all()[self._first[1] :]

    def close(self) -> None:
        self._shell.close(force=True)
