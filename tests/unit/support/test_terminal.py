"""The terminal that tests type into: what it shows, what one would copy from it, and how commands end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.terminal import COLUMNS, LINES, Terminal


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    made = Terminal(tmp_path, os.environ)
    yield made
    made.close()


def test_a_command_runs_in_a_terminal_and_ends_with_its_code(terminal: Terminal) -> None:
    terminal.type("stty size; test -t 1; (exit 3)")
    assert terminal.ended() == 3
    assert terminal.shown() == ["$ stty size; test -t 1; (exit 3)", f"{LINES} {COLUMNS}", "$"]


def test_a_line_that_continues_at_the_edge_is_copied_whole(terminal: Terminal) -> None:
    terminal.type("seq -s, 50")
    assert terminal.ended() == 0
    line = ",".join(map(str, range(1, 51)))
    assert terminal.shown()[1:-1] == [line[:COLUMNS], line[COLUMNS:]]
    assert terminal.copied()[1:-1] == [line]


def test_lines_that_have_left_the_screen_are_kept_and_each_as_it_was_drawn_last(terminal: Terminal) -> None:
    terminal.type("seq 100")
    terminal.ended()
    terminal.type(r"seq 40; printf 'one\ntwo\n\e[2A\e[2Kthree\n\e[2Kfour\n'")
    terminal.ended()
    assert terminal.shown()[1:-1] == [*map(str, range(1, 41)), "three", "four"]
    assert terminal.copied()[1:-1] == terminal.shown()[1:-1]
    assert "one" in terminal.sent


def test_a_program_is_answered_and_interrupted(terminal: Terminal) -> None:
    terminal.type("sed -u 's/^/hello /'")
    terminal.enter("Mira")
    terminal.wait_for("hello Mira")
    terminal.press_ctrl("c")
    assert terminal.ended() == 130


def test_a_command_that_shows_nothing_new_is_not_waited_for(terminal: Terminal) -> None:
    terminal.type("echo begun; sleep 1000")
    with pytest.raises(AssertionError, match=r"begun\s+re.*nothing new"):
        terminal.ended(silent_s=0.5)
