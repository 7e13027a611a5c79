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
import yaml
from typer.testing import CliRunner

from launcher.cli.app import app
from launcher.report import reading, report
from launcher.report.chart import constant_axis, table, thin_curve
from launcher.report.metric_charts import histogram, moving_mean
from launcher.report.page import plotly_script
from launcher.report.reading import DataFacts, RunRecord, read_run
from launcher.report.timeline_charts import coarse, straggler
from tests.storage.doubles import faulty
from tests.support.made_up_run import ADVICE, BEGAN, CARDS, CHARTS, COUNTS, GROUPS, TRACE, WORDS, make_up
from trainer.redact import Redactor
from trainer.run import layout
from trainer.run.events import Event
from trainer.run.jsonl import JsonLinesWriter
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


def test_the_page_has_every_group_card_and_chart(first: RunRecord) -> None:
    page = report([first])
    assert tuple(re.findall(r'<section id="([\w-]+)"', page)) == GROUPS
    assert tuple(re.findall(r'<a href="#([\w-]+)"', page)) == GROUPS
    assert tuple(re.findall(r'<article id="([\w-]+)"', page)) == CARDS
    assert tuple(figures_of(page)) == CHARTS
    assert page.count("<details>") == len(CHARTS)


def test_the_head_has_the_state_and_the_large_figures(first: RunRecord) -> None:
    (head,) = re.findall(r"<header>.*?</header>", report([first]), re.DOTALL)
    assert '<h1>first <span class="state succeeded">succeeded</span></h1>' in head
    assert "step 80 of 80 · 3 attempts" in head
    figures = re.findall(r"<dt>(.*?)</dt><dd>(.*?)<small>(.*?)</small>", html.unescape(head))
    assert figures == [
        ("model", "<model>", ""),
        ("data", "pairs.jsonl", "1.49k samples · 210k tokens"),
        ("hardware", "3 \N{MULTIPLICATION SIGN} A100, 1 \N{MULTIPLICATION SIGN} H100", "3 hosts · ddp"),
        ("duration", "4:24", "60% goodput"),
        ("loss", "3.02 → 1.22", "eval 1.45 → 1.22"),
    ]


def test_a_run_that_failed_says_why_at_its_head(first: RunRecord) -> None:
    status = replace(first.status, state="failed", failure={"cause": "out of memory", "advice": "take less"})
    (head,) = re.findall(r"<header>.*?</header>", report([replace(first, status=status)]), re.DOTALL)
    assert '<pre class="failure">out of memory\n\ntake less</pre>' in head
    again = replace(first, status=replace(status, state="running"))
    assert 'class="failure"' not in report([again]), "its workers were started again"


def test_a_curve_marks_where_attempts_resumed(first: RunRecord) -> None:
    values, mean, lost, marks = figures_of(report([first]))["loss-curve"]["data"]
    assert [trace["name"] for trace in (values, mean, lost, marks)] == ["loss", "loss", "trained again", "resumed"]
    assert [trace["showlegend"] for trace in (values, mean, lost, marks)] == [False, True, True, True]
    assert (marks["text"], marks["x"]) == (["attempt 2", "attempt 3"], [21, 61])
    assert marks["mode"] == "markers", "no text lies on the curve"
    assert lost["x"] == list(range(21, 31))


def test_several_runs_are_in_the_same_plots(runs: Storage, first: RunRecord) -> None:
    figures = figures_of(report([first, read_run(runs.child("second"))]))
    shown = [trace["name"] for trace in figures["loss-curve"]["data"] if trace["showlegend"]]
    assert shown == ["first", "trained again", "resumed", "second"]
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
    assert re.findall(r'<section id="([\w-]+)"', page) == ["data", "recipe"], "no group is empty"
    assert figures_of(page) == {}
    assert "no step yet" in page
    assert "The run has prepared no data yet." in shown(page, "no-data")


def shown(page: str, card: str) -> str:
    (found,) = re.findall(rf'<article id="{card}".*?</article>', page, re.DOTALL)
    return html.unescape(str(found))


def rows_of(page: str, card: str) -> list[list[str]]:
    return cells_of(shown(page, card))


def cells_of(table: str) -> list[list[str]]:
    rows = re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
    return [re.findall(r"<td[^>]*>(?:<i [^>]*></i>)?(.*?)</td>", row, re.DOTALL) for row in rows if "<td" in row]


def test_a_failure_is_shown_with_its_stack_and_what_to_try(first: RunRecord) -> None:
    page = shown(report([first]), "events")
    assert f"<h4>Attempt 1, rank 3 on b</h4>\n<pre>{TRACE}\n\n{ADVICE}</pre>" in page


def test_an_end_tells_its_cause(first: RunRecord) -> None:
    ended = {"event": "end", "attempt": 3, "time": BEGAN + 999, "state": "failed", "cause": "the lease was lost"}
    page = report([replace(first, events=[Event.from_row(ended)])])
    assert rows_of(page, "events")[-1][-2:] == ["end", "failed: the lease was lost"]


def test_settings_that_changed_are_in_the_table_and_on_the_timeline(first: RunRecord) -> None:
    changes = [{"key": "training.micro_batch", "before": 4, "after": 2}, {"key": "name", "before": "<a>", "after": "b"}]
    changed = {"event": "change", "attempt": 1, "time": BEGAN + 30, "writer": "driver2-recipe", "changes": changes}
    page = report([replace(first, events=[*first.events, Event.from_row(changed)])])
    (row,) = (row for row in rows_of(page, "events") if row[2] == "change")
    assert row[1:] == ["1", "change", "for the next attempt: training.micro_batch 4 → 2, name <a> → b"]
    (marks,) = (trace for trace in figures_of(page)["timeline"]["data"] if trace["name"] == "change")
    assert marks["text"] == ["training.micro_batch 4 → 2, name &lt;a&gt; → b"]
    assert "★ change" in shown(page, "timeline")


def test_no_event_and_no_host_is_left_out_of_its_table(first: RunRecord) -> None:
    head = {"attempt": 1, "time": BEGAN}
    events = [{**head, "event": "skipped_checkpoint", "step": i, "reason": "late"} for i in range(150)]
    events.insert(75, {**head, "event": "failure", "cause": "the one"})
    events.append({**head, "event": "start", "step": 0, "hosts": [f"host-{i}" for i in range(150)]})
    page = report([replace(first, events=[*map(Event.from_row, events)])])
    assert "the one" in shown(page, "events")
    assert all(f"<td>host-{i}</td>" in shown(page, "hosts") for i in range(150))


def test_versions_and_devices_are_told_where_they_change(first: RunRecord) -> None:
    page = report([first])
    told = rows_of(page, "versions")
    assert ["torch", "2.13.0", "-"] in told
    assert [row for row in told if row[2] != "-"] == [["torch", "2.14.0", "3"]]
    assert [row[:4] for row in rows_of(page, "hosts")][-2:] == [
        ["3", "b", "2", "A100"],
        ["3", "c", "3", "H100"],
    ]


def test_the_rank_with_the_most_memory_is_named(first: RunRecord) -> None:
    assert "At most 4.078 GiB, on rank 1 at step 80." in shown(report([first]), "memory")


def texts_event(step: int, texts: dict[str, str], when: str | None = None) -> dict[str, Any]:
    told = [{"prompt": prompt, "text": text, "reference": "R" if when else ""} for prompt, text in texts.items()]
    return {"event": "texts", "attempt": 1, "time": BEGAN + step, "step": step, "when": when, "texts": told}


def with_texts(run: RunRecord, *events: dict[str, Any]) -> RunRecord:
    return replace(run, events=[*map(Event.from_row, events)])


def test_a_prompt_has_its_texts_in_one_row(first: RunRecord) -> None:
    before, after = {"Q": "not yet", "O": "no"}, {"O": "yes", "Q": "learnt"}
    told = texts_event(0, before, "before"), texts_event(1, {"P": "of a step"}), texts_event(80, after, "after")
    page = report([with_texts(first, *told)])
    assert rows_of(page, "samples-0") == [["Q", "not yet", "learnt", "R"], ["O", "no", "yes", "R"]]
    assert 'data-label="after (step 80)"' in shown(page, "samples-0")


def test_of_texts_of_steps_the_first_and_the_last_are_shown(first: RunRecord) -> None:
    told = (texts_event(step, {"P": f"of {step}"}) for step in (1, 2, 3))
    assert rows_of(report([with_texts(first, *told)]), "samples-0") == [["P", "of 1", "of 3"]]
    assert rows_of(report([first]), "samples-0")[0][1:] == ["as of 1\n\nreward 0.5", "as of 80\n\nreward 0.5"]


def test_texts_of_a_few_runs_are_beside_each_other(first: RunRecord) -> None:
    mine = texts_event(0, {"Q": "not yet"}, "before"), texts_event(80, {"Q": "learnt"}, "after")
    other = replace(with_texts(first, texts_event(80, {"Q": "knows"}, "after")), label="other")
    page = report([with_texts(first, *mine), other])
    assert rows_of(page, "samples-0") == [["Q", "not yet", "learnt", "knows", "R"]]


def test_answers_are_shown_over_the_evaluations(first: RunRecord) -> None:
    """Of many evaluations a few, of a step that was evaluated twice the later, and apart from the samples."""
    told = [texts_event(step, {"Q": f"at {step}"}, "evaluation") for step in (10, 20, 30, 40, 50, 60, 70)]
    again = {**texts_event(70, {"Q": "better"}, "evaluation"), "time": BEGAN + 99}
    again["texts"] = [{**again["texts"][0], "score": 1.0}]
    samples = texts_event(0, {"Q": "not yet"}, "before"), texts_event(80, {"Q": "learnt"}, "after")
    page = report([with_texts(first, *told, again, *samples)])
    assert rows_of(page, "answers-0") == [["Q", "at 10", "at 30", "at 50", "better\n\nscore 1", "R"]]
    assert 'data-label="evaluation (step 70)"' in shown(page, "answers-0")
    assert rows_of(page, "samples-0") == [["Q", "not yet", "learnt", "R"]]


def compared_of(page: str) -> tuple[list[str], list[list[str]]]:
    (head,) = re.findall(r"<header>.*?</header>", page, re.DOTALL)
    columns = re.findall(r"<th [^>]*>(?:<i [^>]*></i>)?(.*?)</th>", head)
    return columns, cells_of(head)


def tried(run: Storage, ended: str = "succeeded", **changes: Any) -> str:
    make_up(run, ended=ended)
    run.write(
        "recipe.yaml", yaml.safe_dump({"name": run.url, "optimizer": {"lr": 1e-4, "eps": 1e-8, **changes}}).encode()
    )
    return run.url


def test_several_runs_begin_with_what_differs_best_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(str(tmp_path))
    uris = [tried(storage.child("worse")), tried(storage.child("better"), lr=3e-4)]
    runs = reading.read_runs(uris, 10.0)
    assert [run.label for run in runs] == ["worse", "better"], "of equal losses as they were named"
    better = JsonLinesWriter(storage.child("better"), layout.metrics_part(4))
    better.add({"attempt": 4, "step": 80, "eval_loss": 1.0, "time": BEGAN + 500})
    better.close()
    runs = reading.read_runs(uris, 10.0)
    page = report(runs)
    columns, rows = compared_of(page)
    assert columns == ["run", "optimizer.lr", "eval loss", "loss", "state", "step", "wall time", "goodput"]
    assert [row[:3] for row in rows] == [["better", "0.0003", "1.0000"], ["worse", "0.0001", "1.2236"]]
    assert "The recipes differ in 1 setting." in page
    assert page.count("eps: 1.0e-08") == 1, "one recipe stands for all, folded"
    assert "<summary>The complete recipe of better</summary>" in shown(page, "recipe-text")


def test_many_settings_that_differ_are_the_rows(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    many = {f"key{i}": i for i in range(7)}
    uris = [tried(storage.child("a"), **many), tried(storage.child("b"), **dict.fromkeys(many, -1))]
    columns, rows = compared_of(report(reading.read_runs(uris, 10.0)))
    assert columns == ["run", "a", "b"]
    assert [row[0] for row in rows[:2]] == ["eval loss", "loss"]
    assert rows[6] == ["optimizer.key0", "0", "-1"]


def test_the_metrics_of_the_task_have_a_chart_each(first: RunRecord) -> None:
    head = {"attempt": 1, "time": BEGAN, "step": 1}
    rows = [{**head, "loss": 1.0, "accuracy": 0.5}, {**head, "eval_loss": 1.0, "eval_f1": 0.25, "note": "text"}]
    figures = figures_of(report([replace(first, rows=[*map(read_metrics_row, rows)])]))
    assert [key for key in figures if key.startswith("metric-")] == ["metric-accuracy", "metric-eval_f1"]


def test_values_that_are_all_the_same_have_an_axis_that_shows_them() -> None:
    axis = constant_axis([1e-3, 1e-3])
    assert (axis["range"], axis["tickvals"]) == ([0.0, 2e-3], [0.0, 1e-3])
    assert constant_axis([-0.5])["range"] == [-1.0, 0.0]
    assert constant_axis([0.0, 0.0]) == constant_axis([1e-3, 2e-3]) == {}


def test_a_lone_rank_has_no_chart_of_ranks(first: RunRecord) -> None:
    rows = [{"attempt": 1, "step": i, "loss": 1.0, "rank_s": [0.5]} for i in (1, 2)]
    assert "ranks" not in figures_of(report([replace(first, rows=[*map(read_metrics_row, rows)])]))


def test_a_moving_mean_keeps_a_steep_start_and_a_straight_line() -> None:
    line = [(float(x), 2.0 * x) for x in range(200)]
    mean = moving_mean(line)
    assert mean is not None
    assert mean[:190] == [pytest.approx(point) for point in line[:190]]
    assert moving_mean(line[:20]) is None


def test_of_very_many_windows_some_are_counted(first: RunRecord) -> None:
    sampled = replace(first, data=DataFacts(COUNTS, replace(WORDS, sampled=(64, 5000))))
    assert "From 64 of its 5,000 windows, evenly spread: half of" in shown(report([sampled]), "lengths")


@pytest.mark.parametrize(
    ("key", "text", "told"),
    [
        ("provenance.json", "{", "provenance.json"),
        ("data.json", "{", "The prepared data cannot be read"),
        ("data.json", '{"train": {"sources": 7}}', "The prepared data cannot be read"),
        ("data.json", '{"train": "x"}', "The prepared data cannot be read"),
    ],
)
def test_what_is_broken_in_a_run_does_not_keep_the_rest_from_being_shown(
    tmp_path: Path, key: str, text: str, told: str
) -> None:
    run = open_storage(str(tmp_path)).child("broken")
    make_up(run)
    run.write(key, text.encode())
    page = report([read_run(run)])
    assert told in shown(page, "versions" if key.startswith("prov") else "no-data")


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
