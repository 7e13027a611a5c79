"""`muster report`: what is read of a run, and what its page holds; tests/unit/launcher/report/test_page.py opens it."""

from __future__ import annotations

import html
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from launcher.cli.app import app
from launcher.report import reading, report
from launcher.report.chart import table, thin_curve
from launcher.report.metric_charts import histogram
from launcher.report.page import plotly_script
from launcher.report.reading import DataFacts, RunRecord, read_run
from launcher.report.timeline_charts import coarse, straggler
from tests.storage.doubles import faulty
from tests.support.made_up_run import ADVICE, BEGAN, CHARTS, COUNTS, SECTIONS, TRACE, WORDS, make_up
from trainer.redact import Redactor
from trainer.run.events import Event
from trainer.run.metrics import read_metrics_row
from trainer.storage import Storage, open_storage


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
    assert [row.step for row in first.steps] == list(range(1, 81))
    assert [row.step for row in first.lost] == list(range(21, 31))
    assert {row.attempt for row in first.lost} == {1}
    assert [row.step for row in first.evaluations] == [20, 40, 60, 80]


def test_goodput_adds_up(first: RunRecord) -> None:
    told = first.went.to_json()
    assert sum(told["seconds"].values()) == pytest.approx(told["wall_s"])
    assert told["seconds"]["lost"] == pytest.approx(2.5 + sum(row.step_s or 0.0 for row in first.lost))
    assert told["seconds"]["starting"] == pytest.approx(3 * 18 - sum(first.steps[i].step_s or 0.0 for i in (0, 20, 60)))
    assert told["seconds"]["waiting"] == pytest.approx(9 + 4 + 1)
    assert told["seconds"]["compiling"] == pytest.approx(3 * 1.0)


def test_the_page_has_every_section_and_every_chart(first: RunRecord) -> None:
    page = report([first])
    assert tuple(re.findall(r'<section id="([\w-]+)"', page)) == SECTIONS
    assert tuple(figures_of(page)) == CHARTS
    assert page.count("<details>") == len(CHARTS)


def test_a_curve_marks_where_attempts_went_on(first: RunRecord) -> None:
    kept, lost, marks = figures_of(report([first]))["loss"]["data"]
    assert (kept["name"], lost["name"]) == ("first", "first: repeated")
    assert (marks["text"], marks["x"]) == (["attempt 2", "attempt 3"], [21, 61])
    assert lost["x"] == list(range(21, 31))


def test_several_runs_lie_over_each_other(runs: Storage, first: RunRecord) -> None:
    figures = figures_of(report([first, read_run(runs.child("second"))]))
    names = [trace["name"] for trace in figures["loss"]["data"]]
    assert [name for name in names if ":" not in name] == ["first", "second"]
    assert {y for trace in figures["goodput"]["data"] for y in trace["y"]} == {"first", "second"}


def test_the_straggler_is_named(first: RunRecord) -> None:
    assert straggler(first) == "first, attempt 3: the slowest is rank 3 on c, 1.50 times as long as the median."


def test_of_very_many_ranks_the_slowest_are_counted(first: RunRecord) -> None:
    rows = [{"attempt": 1, "step": i, "loss": 1.0, "slowest_rank": 70 if i % 4 else 3} for i in range(1, 9)]
    (bars,) = figures_of(report([replace(first, rows=[*map(read_metrics_row, rows)])]))["ranks"]["data"]
    assert dict(zip(bars["x"], bars["y"], strict=True)) == {70: 6, 3: 2}


def test_a_run_that_has_only_begun_says_what_is_missing(tmp_path: Path) -> None:
    run = open_storage(str(tmp_path)).child("young")
    run.write("recipe.yaml", b"name: young\n")
    page = report([read_run(run)])
    assert tuple(re.findall(r'<section id="([\w-]+)"', page)) == SECTIONS
    assert figures_of(page) == {}
    assert "None: no step has been trained." in page


def shown(page: str, section: str) -> str:
    (found,) = re.findall(rf'<section id="{section}".*?</section>', page, re.DOTALL)
    return html.unescape(str(found))


def rows_of(page: str, section: str) -> list[list[str]]:
    return [
        re.findall(r"<td>(.*?)</td>", row, re.DOTALL) for row in re.findall(r"<tr>(.*?)</tr>", shown(page, section))
    ]


def test_a_failure_is_shown_with_its_stack_and_what_to_try(first: RunRecord) -> None:
    page = shown(report([first]), "timeline")
    assert f"<h3>first, attempt 1, rank 3 on b</h3><pre>{TRACE}\n\n{ADVICE}</pre>" in page


def test_an_end_tells_its_cause(first: RunRecord) -> None:
    ended = {"event": "end", "attempt": 3, "time": BEGAN + 999, "state": "failed", "cause": "the lease was lost"}
    page = report([replace(first, events=[Event.from_row(ended)])])
    assert rows_of(page, "timeline")[-1][-2:] == ["end", "failed: the lease was lost"]


def test_no_event_and_no_host_is_left_out_of_its_table(first: RunRecord) -> None:
    head = {"attempt": 1, "time": BEGAN}
    events = [{**head, "event": "skipped_checkpoint", "step": i, "reason": "late"} for i in range(150)]
    events.insert(75, {**head, "event": "failure", "cause": "the one"})
    events.append({**head, "event": "start", "step": 0, "hosts": [f"host-{i}" for i in range(150)]})
    page = report([replace(first, events=[*map(Event.from_row, events)])])
    assert "the one" in shown(page, "timeline")
    assert all(f"<td>host-{i}</td>" in shown(page, "hosts") for i in range(150))


def test_versions_and_devices_are_told_where_they_change(first: RunRecord) -> None:
    page = report([first])
    told = [row[1:] for row in rows_of(page, "versions") if row]
    assert ["torch", "2.13.0", "-"] in told
    assert [row for row in told if row[2] != "-"] == [["torch", "2.14.0", "3"]]
    assert [row[1:5] for row in rows_of(page, "hosts") if row][-2:] == [
        ["3", "b", "2", "A100"],
        ["3", "c", "3", "H100"],
    ]


def test_the_rank_with_the_most_memory_is_named(first: RunRecord) -> None:
    told = "first: the memory of the rank that uses most; the maximum was 4.078 GiB, on rank 1 at step 80."
    assert told in shown(report([first]), "memory")


def test_texts_that_were_written_to_be_compared_are(first: RunRecord) -> None:
    head = {"event": "texts", "attempt": 1, "time": BEGAN}
    events = [
        {**head, "step": 0, "when": "before", "texts": [{"prompt": "Q", "text": "not yet"}]},
        {**head, "step": 1, "texts": [{"prompt": "P", "text": "of a step"}]},
        {**head, "step": 80, "when": "after", "texts": [{"prompt": "Q", "text": "learnt"}]},
    ]
    rows = rows_of(report([replace(first, events=[*map(Event.from_row, events)])]), "samples")
    assert [row for row in rows if row] == [["before (step 0)", "Q", "not yet"], ["after (step 80)", "Q", "learnt"]]
    assert len(rows_of(report([first]), "samples")) == 3, "of texts of the steps the first and the last"


def test_of_very_many_windows_some_are_counted(first: RunRecord) -> None:
    sampled = replace(first, data=DataFacts(COUNTS, replace(WORDS, sampled=(64, 5000))))
    assert "first, from 64 of its 5,000 windows, evenly spread: half of" in shown(report([sampled]), "lengths")


@pytest.mark.parametrize(
    ("key", "text", "told"),
    [
        ("provenance.json", "{", "provenance.json"),
        ("data.json", "{", "the prepared data cannot be read"),
        ("data.json", '{"train": {"sources": 7}}', "the prepared data cannot be read"),
        ("data.json", '{"train": "x"}', "the prepared data cannot be read"),
    ],
)
def test_what_is_broken_in_a_run_does_not_keep_the_rest_from_being_shown(
    tmp_path: Path, key: str, text: str, told: str
) -> None:
    run = open_storage(str(tmp_path)).child("broken")
    make_up(run)
    run.write(key, text.encode())
    page = report([read_run(run)])
    assert told in shown(page, "versions" if key.startswith("prov") else "data")


@pytest.mark.parametrize("recipe", ["data: [", "- a list", "seed: seven"])
def test_a_recipe_that_is_none_costs_the_lengths_alone(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = faulty()
    monkeypatch.setattr(reading, "read_data", lambda run: {"train": SimpleNamespace(fingerprint="")})
    prepared = SimpleNamespace(count=1, spec=SimpleNamespace(sources=[]), per_source=[])
    monkeypatch.setattr(reading, "open_prepared", lambda shared, fingerprint: prepared)
    assert reading._data(run, recipe, Redactor({})).missing.startswith("the prepared data cannot be read: ")


def test_the_page_is_utf_8_whatever_the_locale_says(runs: Storage, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launcher", "report", runs.child("first").url, "-o", str(tmp_path / "x.html")]
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run(command, check=True, env=environment, capture_output=True)
    assert "of it copying" in (tmp_path / "x.html").read_text(encoding="utf-8")


def test_credentials_stay_out(first: RunRecord, runs: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "2.13.0-secret")
    run = runs.child("first")
    page = report([read_run(run)])
    for secret in ("hush-hush", "not-for-your-eyes", "AKIA1"):
        assert secret not in page
    monkeypatch.setenv("OTHER_TOKEN", "second-secret")
    make_up(runs.child("second-secret"))
    assert "second-secret" not in report([read_run(runs.child("second-secret"))])


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
    with pytest.raises(Exception, match="pip install plotly"):
        report([first])


def test_it_needs_neither_torch_nor_ray() -> None:
    heavy = "{'torch', 'ray', 'peft', 'transformers'} & set(sys.modules)"
    subprocess.run(
        [sys.executable, "-c", f"import sys, launcher.report.reading; assert not {heavy}, {heavy}"], check=True
    )
