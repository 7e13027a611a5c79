"""Paths and names can be copied: no line of them is wrapped or cut, however narrow the terminal."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from rich.console import Console

from launcher.cli.app import main
from launcher.monitor.tables import described_lines
from launcher.monitor.watch import Watch
from tests.unit.launcher.cli.test_status import START, began, hold
from trainer.artifacts.inspect import ArtifactReport
from trainer.checkpoint.record import CommitRecord
from trainer.run import layout
from trainer.run.lease import Holder, LeaseRecord, to_row
from trainer.storage import open_storage

LONG = "a-folder-with-a-name-that-is-longer-than-any-column-of-a-table/and-another-one-below-it"


def test_status_of_a_run_that_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")
    run = began(open_storage(f"{tmp_path}/{LONG}/mine"))
    hold(run, "interrupted", START)
    record = CommitRecord(4, 1, 1, "n", "a000001-s000000004-0123456789ab", {}, {}, "2026-01-01T10:00:00+00:00")
    run.write(record.key, record.to_json())
    monkeypatch.setattr(sys, "argv", ["muster", "status", run.url])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert not [word for word in ("ETA", "tokens/s") if word in out]
    assert "epoch 1, 32 samples" in out
    assert "checkpoint of step 4, 2026-01-01T10:00:00:" in out.splitlines()
    assert run.uri(layout.checkpoint(record.checkpoint)) in out.splitlines()


def test_a_long_job_has_a_line_of_its_own(tmp_path: Path) -> None:
    run = began(open_storage(str(tmp_path / "mine")))
    job = "ray:http://head-of-the-cluster.example.org:8265/raysubmit_0123456789abcdef"
    holder = Holder("a-host-with-a-long-name.example.org", "boot/1", 4711, 1000.0, job)
    run.write_json(layout.LEASE, to_row(LeaseRecord(1, "running", holder, START, 7)))
    out = io.StringIO()
    watch = Watch(run, now=lambda: START)
    Console(file=out, width=80, no_color=True).print(watch.render(80))
    lines = out.getvalue().splitlines()
    assert lines[0] == "mine  running  0 attempts"
    assert job in "\n".join(lines)
    assert "512 tokens/s" in out.getvalue()


def test_inspect_names_paths_above_its_table() -> None:
    base = {"path": f"s3://models/{LONG}", "revision": "main", "dtype": "bfloat16", "quantization": "none"}
    found = ArtifactReport(uri=f"s3://runs/{LONG}/adapter", kind="adapter", task="sft", method="lora", base=base)
    assert [line.plain for line in described_lines(found)] == [found.uri, f"base: {base['path']}"]
