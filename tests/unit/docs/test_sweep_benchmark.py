"""The pure parts of benchmarks/sweep.py: rows, time of training, ratios; and the peak of a tree of processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import sweep
from benchmarks.memory import peak_mib, peak_of_tree_mib
from benchmarks.workloads import make_tokenizer

STARTED = [float(n) for n in range(len(sweep.TRIALS))]


def test_a_row_fills_its_pack(tmp_path: Path) -> None:
    sweep.write_rows(tmp_path / "rows.jsonl", 16, 3)
    tokenizer = make_tokenizer(sweep.VOCABULARY)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    # The end of the text is added in training.
    assert [len(tokenizer(row["prompt"] + row["completion"])["input_ids"]) for row in rows] == [15, 15, 15]


def test_time_of_training_is_added_up_or_is_that_of_all_at_once() -> None:
    runs = [[start, start + 2, start + 5] for start in STARTED]
    assert sweep.training_s(runs, 3, at_once=False) == 5 * len(runs)
    assert sweep.training_s(runs, 3, at_once=True) == 5


def test_trials_with_missing_steps_give_no_time() -> None:
    with pytest.raises(SystemExit, match="8 trials of 3 steps"):
        sweep.training_s([[0.0, 1.0, 2.0]] * 7, 3, at_once=False)
    with pytest.raises(SystemExit, match="8 trials of 3 steps"):
        sweep.training_s([[0.0, 1.0]] * 8, 3, at_once=False)


def test_ratios_of_a_side_are_over_the_trials_together_and_over_one_run() -> None:
    found = {
        sweep.ALONE: [sweep.Run(90.0, 30.0, 1000.0), sweep.Run(100.0, 40.0, 1000.0)],
        sweep.TOGETHER: [sweep.Run(30.0, 20.0, 1500.0), sweep.Run(50.0, 20.0, 2000.0)],
    }
    alone, together = sweep.table("16", found)
    assert alone == "| 16 | one by one | 95 | 35.0 | 2.50 (2.00 to 3.00) | 1.75 (1.50 to 2.00) | 1,000 |  |"
    assert together == "| 16 | together | 40 | 20.0 |  |  | 1,750 | 1.75 (1.50 to 2.00) |"


def test_the_peak_of_a_tree_counts_the_processes_below() -> None:
    held = "held = bytearray(b'x' * 2**26)"
    program = f"{held}; print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as below:
        assert below.stdin is not None
        assert below.stdout is not None
        below.stdout.readline()
        assert peak_of_tree_mib(os.getpid()) >= peak_mib() + 64
        below.communicate("\n")
    assert peak_of_tree_mib(below.pid) == 0.0
