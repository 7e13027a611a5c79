"""The live display: lines that fit a terminal, and the end of every run."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from launcher.monitor.progress import LiveLine, Progress
from tests.unit.trainer.progress.test_progress import HUGE, Clock, step_row, write_rows
from trainer.storage import open_storage


@pytest.mark.parametrize("width", [40, 80, 140])
def test_the_live_lines_hold_no_control_characters(width: int) -> None:
    clock = Clock()
    line = LiveLine(clock)

    def shown() -> str:
        console = Console(file=io.StringIO(), width=width, force_terminal=True, no_color=True)
        console.print(line, end="")
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()

    clock.now = 75.0
    assert shown().rstrip("\n") == "waiting for the first step, 1:15"
    line.standing = HUGE
    lines = shown().splitlines()
    assert len(lines) == 4
    assert "\x1b" not in "".join(lines)
    assert max(map(len, lines)) <= width


@pytest.mark.parametrize("terminal", [False, True])
def test_training_shows_the_end_even_of_a_run_that_fails(tmp_path: Path, terminal: bool) -> None:
    run, out = open_storage(str(tmp_path / "run")), io.StringIO()
    progress = Progress(Console(file=out, width=100, force_terminal=terminal))

    def train() -> None:
        with progress.training(run, 0, 20) as watch:
            watch()
            write_rows(run, "metrics/a000001-000000.jsonl", step_row(20))
            raise RuntimeError("a worker died")

    with pytest.raises(RuntimeError):
        train()
    assert "step 20/20" in out.getvalue()
