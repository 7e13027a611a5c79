"""`muster report`: read, drawn, and opened in a browser that is not there to be seen."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from launcher.cli import app
from launcher.report import report
from launcher.report.censor import Censor
from launcher.report.chart import table, thin_curve
from launcher.report.curves import histogram
from launcher.report.flow import coarse, straggler
from launcher.report.page import plotly_script
from launcher.report.reading import DataFacts, RunRecord, read_run
from tests.support.made_up_run import BEGAN, COUNTS, make_up
from trainer.data.summary import Bin, Summary
from trainer.storage import Storage, open_storage

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SECTIONS = (
    "summary", "loss", "eval-loss", "learning-rate", "gradient-norm", "throughput", "memory", "step-times", "ranks",
    "timeline", "goodput", "checkpoints", "data", "lengths", "samples", "recipe", "versions", "hosts",
)  # fmt: skip
CHARTS = (*SECTIONS[1:12], "data", "lengths")
WORDS = Summary([Bin(10, 20, 700), Bin(21, 31, 300)], 18, 29, 31, 120, 0.93)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    storage = open_storage(str(tmp_path_factory.mktemp("runs")))
    make_up(storage.child("first"))
    make_up(storage.child("second"), lr=3e-4, ended="interrupted")
    return storage


@pytest.fixture(scope="module")
def first(runs: Storage) -> RunRecord:
    return replace(read_run(runs.child("first")), data=DataFacts(COUNTS, WORDS))


def figures_of(page: str) -> dict[str, Any]:
    (text,) = re.findall(r'<script type="application/json" id="figures">(.*?)</script>', page)
    figures: dict[str, Any] = json.loads(text)
    return figures


def test_steps_that_were_done_again_count_once(first: RunRecord) -> None:
    assert [row["step"] for row in first.steps] == list(range(1, 81))
    assert [row["step"] for row in first.lost] == list(range(21, 31))
    assert {row["attempt"] for row in first.lost} == {1}
    assert [row["step"] for row in first.evaluations] == [20, 40, 60, 80]


def test_goodput_adds_up(first: RunRecord) -> None:
    told = first.went.to_json()
    assert sum(told["seconds"].values()) == pytest.approx(told["wall_s"])
    assert told["seconds"]["lost"] == pytest.approx(2.5 + sum(row["step_s"] for row in first.lost))
    assert told["seconds"]["starting"] == pytest.approx(3 * 18 - sum(first.steps[i]["step_s"] for i in (0, 20, 60)))
    assert told["seconds"]["waiting"] == pytest.approx(9 + 4 + 1)


def test_the_page_has_every_section_and_every_chart(first: RunRecord) -> None:
    page = report([first])
    assert tuple(re.findall(r'<section id="([\w-]+)"', page)) == SECTIONS
    assert tuple(figures_of(page)) == CHARTS
    assert page.count("<details>") == len(CHARTS)


def test_a_curve_marks_where_attempts_went_on(first: RunRecord) -> None:
    kept, lost, marks = figures_of(report([first]))["loss"]["data"]
    assert (kept["name"], lost["name"]) == ("first", "first: done again")
    assert (marks["text"], marks["x"]) == (["attempt 2", "attempt 3"], [21, 61])
    assert lost["x"] == list(range(21, 31))


def test_several_runs_lie_over_each_other(runs: Storage, first: RunRecord) -> None:
    figures = figures_of(report([first, read_run(runs.child("second"))]))
    names = [trace["name"] for trace in figures["loss"]["data"]]
    assert [name for name in names if ":" not in name] == ["first", "second"]
    assert {y for trace in figures["goodput"]["data"] for y in trace["y"]} == {"first", "second"}


def test_the_straggler_is_named(first: RunRecord) -> None:
    assert straggler(first) == "first, attempt 3: the slowest is rank 3 on c, 1.50 times as long as the middle one."


def test_of_very_many_ranks_the_slowest_are_counted(first: RunRecord) -> None:
    rows = [{"attempt": 1, "step": i, "loss": 1.0, "slowest_rank": 70 if i % 4 else 3} for i in range(1, 9)]
    (bars,) = figures_of(report([replace(first, rows=rows)]))["ranks"]["data"]
    assert dict(zip(bars["x"], bars["y"], strict=True)) == {70: 6, 3: 2}


def test_a_run_that_has_only_begun_says_what_is_missing(tmp_path: Path) -> None:
    run = open_storage(str(tmp_path)).child("young")
    run.write("recipe.yaml", b"name: young\n")
    page = report([read_run(run)])
    assert tuple(re.findall(r'<section id="([\w-]+)"', page)) == SECTIONS
    assert figures_of(page) == {}
    assert "None: no step has been trained." in page


def test_credentials_stay_out(first: RunRecord, runs: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "2.13.0-secret")
    page = report([read_run(runs.child("first"))])
    for secret in ("hush-hush", "not-for-your-eyes", "AKIA1"):
        assert secret not in page
    censor = Censor({"A_SECRET": "s3cr3tvalue", "HOME": "/home/somebody"})
    assert censor.text("x s3cr3tvalue /home/somebody") == "x *** /home/somebody"
    assert censor.text("https://u:p@h/x?X-Amz-Signature=abc&y=1") == "https://***@h/x?X-Amz-Signature=***&y=1"
    assert censor.text("hub_token: abc\ntokenizer: abc") == "hub_token: ***\ntokenizer: abc"
    assert censor.clean({"api_key": "k", "n": [1, "password: x"]}) == {"api_key": "***", "n": [1, "password: ***"]}


def test_everything_is_escaped(first: RunRecord) -> None:
    page = report([first]).replace(plotly_script(), "")
    assert "<script>alert" not in page
    assert "<b>killed" not in page
    assert html.escape("<b>killed</b>") in page
    assert "org/&lt;model&gt;" in page
    assert not re.search(r'(?:src|href)="(?!#|data:)', page)


def test_long_curves_keep_their_spikes() -> None:
    points = [(float(i), 1e9 if i == 31_337 else 0.0) for i in range(100_000)]
    shown = thin_curve(points)
    assert len(shown) <= 2000
    assert (31_337.0, 1e9) in shown
    assert table(("a",), [[i] for i in range(1000)]).thinned == 1000


def test_histograms_count_everything() -> None:
    assert sum(histogram([1.0, 2.0, 3.0, 3.0])[2]) == 4
    assert sum(histogram([5.0, 5.0])[2]) == 2


def test_what_is_too_short_to_be_seen_is_joined(first: RunRecord) -> None:
    pieces = coarse(first.went.pieces, 1.0)
    assert len(pieces) < len(first.went.pieces)
    assert (pieces[0].begin, pieces[-1].end) == (BEGAN, first.went.pieces[-1].end)
    assert all(a.end == b.begin for a, b in pairwise(pieces))


def test_the_command(runs: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    url = runs.child("first").url
    done = CliRunner().invoke(app, ["report", url, runs.child("second").url])
    assert (done.exit_code, done.stdout) == (0, "first.html\n")
    assert CliRunner().invoke(app, ["report", url, "-o", "x.html"]).exit_code == 0
    assert {"first.html", "x.html"} == {path.name for path in tmp_path.iterdir()}
    status = json.loads(CliRunner().invoke(app, ["status", url, "--json"]).stdout)
    assert set(status["goodput"]) == {"wall_s", "seconds", "starting", "goodput"}


def test_without_plotly_it_says_what_to_install(first: RunRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(Exception, match=r"pip install 'muster\[report\]'"):
        report([first])


def test_it_needs_neither_torch_nor_ray() -> None:
    heavy = "{'torch', 'ray', 'peft', 'transformers'} & set(sys.modules)"
    subprocess.run(
        [sys.executable, "-c", f"import sys, launcher.report.reading; assert not {heavy}, {heavy}"], check=True
    )


def opened(page: Path, folder: Path, *more: str) -> tuple[str, list[str]]:
    """The document as the browser has made it, and what its scripts have said."""
    assert BROWSER is not None
    quiet = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    quiet += ["--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--v=0"]
    command = [BROWSER, "--headless", "--no-sandbox", *quiet, f"--user-data-dir={folder}", *more, page.as_uri()]
    environment = {**os.environ, "HOME": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(BROWSER is None, reason="no chromium: apt-get install chromium")
def test_a_browser_draws_it_and_complains_of_nothing(first: RunRecord, runs: Storage, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(report([first, read_run(runs.child("second"))]))
    document, said = opened(page, tmp_path / "profile", "--dump-dom", "--virtual-time-budget=10000")
    assert said == []
    assert f'data-drawn="{len(CHARTS)}"' in document
    drawn = re.findall(r'class="chart[^"]*"[^>]*data-chart="([\w-]+)"', document)
    assert tuple(drawn) == CHARTS
    parts = re.split(r"data-chart=", document.split("</main>")[0])[1:]
    for part in parts:
        name, body = part[1:30].split('"')[0], part.split("</details>")[0]
        assert "<svg" in body, name
        assert re.search(r'class="(trace|point)[^"]*"', body), name
        assert re.search(r'<path[^>]* d="M', body), name
